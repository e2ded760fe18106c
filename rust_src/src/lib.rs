//! CPU kernels of Bio-Inspired Nanochat: plain Rust functions and, with the `python` feature, the Python module
//! `bio_inspired_nanochat._rust`. The definitions are the PyTorch references in `bio_inspired_nanochat/kernels`.

pub mod accounts;
pub mod decode;
pub mod dot;
pub mod layer;
pub mod math;
pub mod moe;
pub mod parallel;
pub mod prefill;
pub mod presyn;
pub mod route;
pub mod simd;
mod split;
pub mod tile;

#[cfg(feature = "python")]
mod python;
#[cfg(feature = "python")]
mod python_moe;
