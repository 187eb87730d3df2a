//! Threads of our own (rayon), for a process without an OpenMP runtime.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Runs `work` once on each of `threads` threads, or once here where the system gives no threads.
pub(crate) fn run(threads: usize, work: &(impl Fn() + Sync)) {
    match pool(threads) {
        Some(pool) => drop(pool.broadcast(|_| work())),
        None => work(),
    }
}

/// A pool is started once for each thread count, and again in a forked process, which inherits no threads.
fn pool(threads: usize) -> Option<Arc<ThreadPool>> {
    type Pools = Mutex<HashMap<(u32, usize), Arc<ThreadPool>>>;
    static POOLS: OnceLock<Pools> = OnceLock::new();
    let mut pools = POOLS.get_or_init(Pools::default).lock().unwrap_or_else(PoisonError::into_inner);
    let key = (std::process::id(), threads);
    if let Some(pool) = pools.get(&key) {
        return Some(Arc::clone(pool));
    }
    let name = |index| format!("headkv-{index}");
    let pool = Arc::new(ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build().ok()?);
    pools.insert(key, Arc::clone(&pool));
    Some(pool)
}
