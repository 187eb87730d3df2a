//! Attention, append and gather over a ragged KV cache: plain functions on slices.
//!
//! A layer is two flat pools, `keys` and `values`, `[slots, D]`, or half as wide where a byte holds two channels. Row `r`
//! (one batch entry and KV head, `b * H + h`) owns the slots `start[r] .. start[r] + capacity[r]`; its first `length[r]`
//! slots hold entries, oldest first. Every function checks its arguments before it touches the pools and returns an
//! [`Error`] that names the wrong one.

mod attention;
mod compensation;
mod element;
mod error;
mod kernel;
mod layer;
mod math;
mod moves;
mod openmp;
mod pools;
mod products;
mod quantised;
mod residual;
mod schedule;
mod scratch;
mod simd;
mod threads;
#[cfg(target_arch = "x86_64")]
mod whole;

pub use attention::{Options, Queries, attend};
pub use element::Element;
pub use error::{Error, Result};
pub use layer::{Layer, Rows, Sums};
pub use moves::{Entries, Pools, append, gather};
pub use quantised::{Code, Float, Floats, quantise};
pub use residual::{Residual, hold};
pub use simd::Isa;

pub use half::slice::HalfBitsSliceExt;
pub use half::{bf16, f16};
