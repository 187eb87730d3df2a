//! The OpenMP threads that the process has already, torch's on Linux: found by name, not linked.

use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Runs a function on a team of threads. Of GNU's OpenMP runtime; LLVM's has it too, for programs built by gcc.
type Parallel = unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void, u32, u32);

#[derive(Clone, Copy)]
pub(crate) struct Team(Parallel);

impl Team {
    /// None where no OpenMP runtime is loaded, and in a forked process, in which OpenMP waits for threads that are gone.
    pub fn of_process() -> Option<Team> {
        static FOUND: OnceLock<(u32, Option<Team>)> = OnceLock::new();
        let (process, team) = *FOUND.get_or_init(|| (std::process::id(), find().map(Team)));
        if process == std::process::id() { team } else { None }
    }

    /// Runs `work` once on each of at most `threads` threads, the calling one among them; fewer inside a parallel region.
    pub fn run<F: Fn() + Sync>(self, threads: usize, work: &F) {
        let call = Call { work, panic: Mutex::new(None) };
        let threads = u32::try_from(threads).unwrap_or(u32::MAX);
        // SAFETY: `member::<F>` gets a pointer to `call`, which lives until all threads have returned; it does not unwind.
        unsafe { (self.0)(member::<F>, (&raw const call).cast_mut().cast(), threads, 0) };
        if let Some(panic) = call.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

struct Call<'a, F> {
    work: &'a F,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// What every thread of the team runs.
///
/// # Safety
/// `call` points to a `Call<F>`.
unsafe extern "C" fn member<F: Fn() + Sync>(call: *mut c_void) {
    // SAFETY: the caller's promise; the threads share it, and `F` is Sync.
    let call = unsafe { &*call.cast::<Call<F>>() };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(call.work)) {
        *call.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
    }
}

#[cfg(unix)]
fn find() -> Option<Parallel> {
    // SAFETY: the name ends with 0.
    let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"GOMP_parallel".as_ptr()) };
    // SAFETY: the symbol of that name has this signature, in every runtime that has it.
    (!symbol.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, Parallel>(symbol) })
}

#[cfg(not(unix))]
fn find() -> Option<Parallel> {
    None
}
