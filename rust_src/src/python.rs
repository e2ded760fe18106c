//! The Python module: arrays in and out without copies, every size checked, the interpreter lock released while kernels run.
//!
//! What does not fit is a ValueError or TypeError; a panic, which would be a mistake in a kernel, becomes a RuntimeError.

use std::panic::{AssertUnwindSafe, catch_unwind};

use numpy::{Element, PyArray1, PyArrayMethods, PyReadonlyArray1, PyReadonlyArrayDyn, PyReadwriteArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::layer::{Arrival, Barrier, Cache, Running, Site};
use crate::prefill::Pairs;
use crate::presyn::{self, Course, Kinetics, States, Terminal};
use crate::{decode, math, prefill};

type Read<'py, T> = PyReadonlyArrayDyn<'py, T>;
type Write<'py, T> = PyReadwriteArrayDyn<'py, T>;

pub fn wrong(text: impl Into<String>) -> PyErr {
    PyValueError::new_err(text.into())
}

/// Run a kernel without the interpreter lock.
pub fn guarded<R: Send>(py: Python<'_>, kernel: impl FnOnce() -> Result<R, String> + Send) -> PyResult<R> {
    match py.detach(|| catch_unwind(AssertUnwindSafe(kernel))) {
        Ok(done) => done.map_err(wrong),
        Err(_) => Err(PyRuntimeError::new_err("a kernel of the Rust extension failed; please report it")),
    }
}

/// Sizes of an array with four dimensions.
fn sizes<T: Element>(array: &Read<'_, T>, name: &str) -> PyResult<[usize; 4]> {
    array.shape().try_into().map_err(|_| wrong(format!("{name} has {} dimensions, expected 4", array.ndim())))
}

/// Keys or values in one of the two formats of a cache.
#[derive(FromPyObject)]
enum Numbers<'py> {
    #[pyo3(transparent)]
    Single(Read<'py, f32>),
    #[pyo3(transparent)]
    Brain(Read<'py, u16>),
}

impl Numbers<'_> {
    fn sizes(&self, name: &str) -> PyResult<[usize; 4]> {
        match self {
            Numbers::Single(array) => sizes(array, name),
            Numbers::Brain(array) => sizes(array, name),
        }
    }
}

/// Kinetics of the terminals of H heads.
#[pyclass(frozen)]
pub struct Terminals {
    pub all: Vec<Terminal>,
}

#[pymethods]
impl Terminals {
    /// constants: `[11, H]` in the order of `Kinetics`.
    #[new]
    fn new(constants: Read<'_, f32>, tick: usize, beta_max: f32, epsilon: f32) -> PyResult<Self> {
        let (shape, values) = (constants.shape(), constants.as_slice()?);
        if shape.len() != 2 || shape[0] != 11 || tick == 0 {
            return Err(wrong(format!("constants have shape {shape:?}, tick is {tick}")));
        }
        let heads = shape[1];
        let made = |h: usize| {
            let at = |i: usize| values[i * heads + h];
            let kinetics = Kinetics {
                tau_c: at(0),
                tau_rrp: at(1),
                alpha_ca: at(2),
                k_fast: at(3),
                k_slow: at(4),
                syt_mix: at(5),
                syt_gain: at(6),
                release_bias: at(7),
                release_rate: at(8),
                gain_release: at(9),
                gain_depletion: at(10),
            };
            Terminal::new(kinetics, tick, beta_max, epsilon)
        };
        Ok(Terminals { all: (0..heads).map(made).collect() })
    }
}

/// Everything of a layer that does not change from token to token; without `terminals` it has none.
#[pyclass(frozen)]
struct Layer {
    site: Site,
}

#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    tick: usize,
    scale: f32,
    window: Option<usize>,
    soft: bool,
    barrier: String,
}

#[pymethods]
impl Layer {
    #[new]
    fn new(shape: Shape, theta: Vec<f32>, strength: Vec<f32>, terminals: Option<PyRef<'_, Terminals>>) -> PyResult<Self> {
        let terminals = terminals.map_or_else(Vec::new, |given| given.all.clone());
        let barrier = match shape.barrier.as_str() {
            "none" => Barrier::None,
            "linear" => Barrier::Linear,
            "gated" => Barrier::Gated,
            other => return Err(wrong(format!("barrier {other:?} is not known"))),
        };
        let (heads, guarded) = (shape.heads, barrier != Barrier::None);
        let fits = heads > 0 && shape.kv_heads > 0 && heads % shape.kv_heads == 0 && shape.dim > 0 && shape.tick > 0;
        let lengths = theta.len() == terminals.len() && strength.len() == if guarded { heads } else { 0 };
        if !fits || !lengths || !(terminals.is_empty() || terminals.len() == heads) || shape.window == Some(0) {
            return Err(wrong("sizes of a layer do not fit"));
        }
        let (kv_heads, dim, tick, scale, soft) = (shape.kv_heads, shape.dim, shape.tick, shape.scale, shape.soft);
        let window = shape.window.unwrap_or(usize::MAX);
        Ok(Layer { site: Site { heads, kv_heads, dim, tick, scale, window, soft, theta, terminals, barrier, strength } })
    }
}

/// Caches and terminals of a layer; what it has not is None.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Held<'py> {
    k: Numbers<'py>,
    v: Numbers<'py>,
    calcium: Option<Write<'py, f32>>,
    vesicles: Option<Write<'py, f32>>,
    open_drive: Option<Write<'py, f32>>,
    beta: Option<Write<'py, f32>>,
    barrier: Option<Write<'py, f64>>,
}

fn whole<'a, T: Element>(array: &'a mut Option<Write<'_, T>>) -> PyResult<&'a mut [T]> {
    match array {
        Some(array) => Ok(array.as_slice_mut()?),
        None => Ok(&mut []),
    }
}

/// New tokens: q `[B, H, t, D]`, whose output goes to y; gate `[B, t, H]` or None; positions and numbers of real tokens per row.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Tokens<'py> {
    q: Read<'py, f32>,
    y: Write<'py, f32>,
    gate: Option<Read<'py, f32>>,
    starts: Vec<usize>,
    counts: Vec<usize>,
}

/// Attention of new tokens of running sequences: a decoding step for one token per row, else a chunk. Changes y and what is held.
///
/// Returns whether all logits were finite.
#[pyfunction]
fn advance(py: Python<'_>, layer: &Layer, mut held: Held<'_>, mut tokens: Tokens<'_>, threads: usize) -> PyResult<bool> {
    let (site, length) = (&layer.site, held.k.sizes("k")?[2]);
    let running = Running {
        calcium: whole(&mut held.calcium)?,
        vesicles: whole(&mut held.vesicles)?,
        open_drive: whole(&mut held.open_drive)?,
        beta: whole(&mut held.beta)?,
        level: whole(&mut held.barrier)?,
    };
    let new = Arrival {
        size: sizes(&tokens.q, "q")?[2],
        q: tokens.q.as_slice()?,
        y: tokens.y.as_slice_mut()?,
        gate: tokens.gate.as_ref().map_or(Ok(&[][..]), |gate| gate.as_slice())?,
        starts: &tokens.starts,
        counts: &tokens.counts,
    };
    match (&held.k, &held.v) {
        (Numbers::Single(k), Numbers::Single(v)) => {
            let cache = Cache { k: k.as_slice()?, v: v.as_slice()?, length };
            let kernel = if new.size == 1 { decode::step } else { prefill::chunk };
            guarded(py, || kernel(site, &cache, running, new, threads))
        }
        (Numbers::Brain(k), Numbers::Brain(v)) => {
            let cache = Cache { k: k.as_slice()?, v: v.as_slice()?, length };
            let kernel = if new.size == 1 { decode::step } else { prefill::chunk };
            guarded(py, || kernel(site, &cache, running, new, threads))
        }
        _ => Err(wrong("keys and values differ in their format")),
    }
}

/// Terminals over ticks. drive, beta `[B, H, N, K]`; calcium, vesicles, open_drive `[B, H, K]`; beta and the latter are changed.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "one argument per array")]
fn run_terminals(
    py: Python<'_>,
    terminals: &Terminals,
    drive: Read<'_, f32>,
    mut beta: Write<'_, f32>,
    mut calcium: Write<'_, f32>,
    mut vesicles: Write<'_, f32>,
    mut open_drive: Write<'_, f32>,
    closed: Vec<usize>,
    young: bool,
    threads: usize,
) -> PyResult<()> {
    let [rows, heads, _, keys] = sizes(&drive, "drive")?;
    let same = [calcium.shape(), vesicles.shape(), open_drive.shape()].iter().all(|shape| *shape == [rows, heads, keys]);
    if !same || beta.shape() != drive.shape() || closed.len() != rows || heads != terminals.all.len() {
        return Err(wrong(format!("sizes of drive {:?}, bias and states do not fit", drive.shape())));
    }
    let (drive, beta) = (drive.as_slice()?, beta.as_slice_mut()?);
    let states = States { calcium: calcium.as_slice_mut()?, vesicles: vesicles.as_slice_mut()?, open_drive: open_drive.as_slice_mut()? };
    guarded(py, || {
        presyn::run(&terminals.all, drive, beta, states, &Course { keys, closed: &closed, young }, threads);
        Ok(())
    })
}

/// Queries and keys of a single operator.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Sides<'py> {
    q: Read<'py, f32>,
    k: Numbers<'py>,
    starts: Vec<usize>,
    counts: Vec<usize>,
    tick: usize,
    window: Option<usize>,
    scale: f32,
}

impl Sides<'_> {
    fn pairs<'a, T: Element>(&'a self, k: &'a Read<'_, T>) -> PyResult<Pairs<'a, T>> {
        let ([_, heads, size, dim], [_, kv_heads, keys, _]) = (sizes(&self.q, "q")?, sizes(k, "k")?);
        let (q, k, starts, counts) = (self.q.as_slice()?, k.as_slice()?, &self.starts[..], &self.counts[..]);
        let window = self.window.unwrap_or(usize::MAX);
        Ok(Pairs { q, k, starts, counts, size, keys, heads, kv_heads, dim, tick: self.tick, window, scale: self.scale })
    }
}

/// Adds the drive of every tick to `drive` `[B, H, N, K]`; theta `[H]`.
#[pyfunction]
fn tick_drive(py: Python<'_>, sides: Sides<'_>, theta: Vec<f32>, soft: bool, mut drive: Write<'_, f32>, threads: usize) -> PyResult<()> {
    let drive = drive.as_slice_mut()?;
    match &sides.k {
        Numbers::Single(k) => {
            let pairs = sides.pairs(k)?;
            guarded(py, || pairs.drive(&theta, soft, drive, threads))
        }
        Numbers::Brain(k) => {
            let pairs = sides.pairs(k)?;
            guarded(py, || pairs.drive(&theta, soft, drive, threads))
        }
    }
}

/// Attention with a bias per tick, beta `[B, H, N, K]` or None, to y `[B, H, t, D]`.
#[pyfunction]
fn attend(
    py: Python<'_>,
    sides: Sides<'_>,
    v: Numbers<'_>,
    beta: Option<Read<'_, f32>>,
    mut y: Write<'_, f32>,
    threads: usize,
) -> PyResult<()> {
    let beta = beta.as_ref().map(|beta| beta.as_slice()).transpose()?;
    let y = y.as_slice_mut()?;
    match (&sides.k, &v) {
        (Numbers::Single(k), Numbers::Single(v)) => {
            let (pairs, v) = (sides.pairs(k)?, v.as_slice()?);
            guarded(py, || pairs.attend(v, beta, y, threads))
        }
        (Numbers::Brain(k), Numbers::Brain(v)) => {
            let (pairs, v) = (sides.pairs(k)?, v.as_slice()?);
            guarded(py, || pairs.attend(v, beta, y, threads))
        }
        _ => Err(wrong("keys and values differ in their format")),
    }
}

/// The version that this extension was built as.
#[pyfunction]
fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Drive of a terminal, elementwise: float32 [n] (contiguous) to float32 [n].
#[pyfunction]
fn phi<'py>(py: Python<'py>, x: PyReadonlyArray1<'py, f32>) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let input = x.as_slice()?;
    let output = PyArray1::<f32>::zeros(py, input.len(), false);
    let mut writable = output.readwrite();
    let target = writable.as_slice_mut()?;
    py.detach(|| target.iter_mut().zip(input).for_each(|(y, &x)| *y = math::phi(x)));
    drop(writable);
    Ok(output)
}

#[pymodule]
mod _rust {
    #[pymodule_export]
    use super::{Layer, Terminals, advance, attend, phi, run_terminals, tick_drive, version};
    #[pymodule_export]
    use crate::python_moe::{Router, mix_experts, routing_sums, settle_accounts};
}
