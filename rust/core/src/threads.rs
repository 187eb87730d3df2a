use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Runs `work` on every item, on up to `threads` threads; in place when there is one item or one thread.
pub(crate) fn for_each<I: Send>(threads: usize, items: Vec<I>, work: impl Fn(I) + Send + Sync) {
    let pool = if threads > 1 && items.len() > 1 { pool(threads) } else { None };
    match pool {
        Some(pool) => pool.install(|| items.into_par_iter().with_max_len(1).for_each(&work)),
        None => items.into_iter().for_each(work),
    }
}

/// A pool is started once for each thread count, and again in a forked process, which inherits no threads. None where
/// the system gives no threads.
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
