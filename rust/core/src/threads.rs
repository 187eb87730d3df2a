//! Work handed out to threads, those of the process where it has some.

use std::sync::{Mutex, PoisonError};

use crate::openmp;
use crate::pools;

/// Runs `work` on every item, on up to `threads` threads; in place when there is one item or one thread.
///
/// The threads are those of the process's OpenMP runtime where it has one. torch's operators leave them spinning for many
/// milliseconds, on the very cores that a second set of threads would need: on two cores that cost a third of the speed.
pub(crate) fn for_each<I: Send>(threads: usize, items: Vec<I>, work: impl Fn(I) + Send + Sync) {
    if threads <= 1 || items.len() <= 1 {
        return items.into_iter().for_each(work);
    }
    let threads = threads.min(items.len());
    let queue = Mutex::new(items.into_iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let worker = || {
        while let Some(item) = next() {
            work(item);
        }
    };
    match openmp::Team::of_process() {
        Some(team) => team.run(threads, &worker),
        None => pools::run(threads, &worker),
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_item_once() {
        for threads in [1, 2, 5] {
            let sum = AtomicUsize::new(0);
            for_each(threads, (0..1000).collect(), |i: usize| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 499_500);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        let run = || for_each(3, (0..9).collect(), |i: usize| assert_ne!(i, 4));
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
    }
}
