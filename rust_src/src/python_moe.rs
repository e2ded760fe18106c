//! The part of the Python module that serves experts: arrays in and out without copies, every size checked.

use numpy::{Element, PyReadonlyArrayDyn, PyReadwriteArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::accounts::{Book, Choices, Rates, Step, Sums};
use crate::moe::Bank;
use crate::presyn::Terminal;
use crate::python::{Terminals, guarded, wrong};
use crate::route::{self, Codes, Held};

type Read<'py, T> = PyReadonlyArrayDyn<'py, T>;
type Write<'py, T> = PyReadwriteArrayDyn<'py, T>;

/// Indices as they are kept in Python.
fn indices(array: &Read<'_, i64>) -> PyResult<Vec<usize>> {
    array.as_slice()?.iter().map(|&i| usize::try_from(i).map_err(|_| wrong(format!("{i} is no index")))).collect()
}

/// Everything of a router that does not change from token to token.
#[pyclass(frozen)]
pub struct Router {
    router: route::Router,
}

/// `[E]` each but lateral `[E, E]`; terminals, plain, lateral and nmda may be missing. codes: gain and unit vectors `[E, d]`.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Parts<'py> {
    k: usize,
    tick: usize,
    fair: f32,
    alive: Read<'py, bool>,
    lead: Read<'py, i64>,
    child: Read<'py, i64>,
    bank: Read<'py, f32>,
    balance: Read<'py, f32>,
    blend: Read<'py, f32>,
    tie: Read<'py, f32>,
    codes: Vec<(f32, Read<'py, f32>)>,
    lateral: Option<Read<'py, f32>>,
    terminals: Option<PyRef<'py, Terminals>>,
    plain: Option<PyRef<'py, Terminals>>,
    vesicle_gain: f32,
    nmda: Option<(f32, f32)>,
}

#[pymethods]
impl Router {
    #[new]
    fn new(parts: Parts<'_>) -> PyResult<Self> {
        let own = |array: &Read<'_, f32>| -> PyResult<Vec<f32>> { Ok(array.as_slice()?.to_vec()) };
        let all = |given: &Option<PyRef<'_, Terminals>>| -> Vec<Terminal> { given.as_ref().map_or_else(Vec::new, |t| t.all.clone()) };
        let codes = parts.codes.iter().map(|(gain, units)| {
            let dim = units.shape().get(1).copied().ok_or_else(|| wrong("codes have no two dimensions"))?;
            Ok(Codes { gain: *gain, units: own(units)?, dim })
        });
        let router = route::Router {
            k: parts.k,
            tick: parts.tick,
            fair: parts.fair,
            alive: parts.alive.as_slice()?.to_vec(),
            lead: indices(&parts.lead)?,
            child: indices(&parts.child)?,
            bank: own(&parts.bank)?,
            balance: own(&parts.balance)?,
            blend: own(&parts.blend)?,
            tie: own(&parts.tie)?,
            codes: codes.collect::<PyResult<_>>()?,
            lateral: parts.lateral.as_ref().map_or_else(|| Ok(Vec::new()), own)?,
            terminals: all(&parts.terminals),
            plain: all(&parts.plain),
            vesicle_gain: parts.vesicle_gain,
            nmda: parts.nmda,
        };
        router.check().map_err(wrong)?;
        Ok(Router { router })
    }
}

/// The matrices of a mixture: router `[E, D]`, probes `[d, D]` in the order of the router's codes, `w_in` `[E, F, D]`, `w_out` `[E, D, F]`.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Matrices<'py> {
    router: Read<'py, f32>,
    probes: Vec<Read<'py, f32>>,
    w_in: Read<'py, f32>,
    w_out: Read<'py, f32>,
}

/// Experts of running sequences, `[B, E]` each.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct State<'py> {
    calcium: Write<'py, f32>,
    vesicles: Write<'py, f32>,
    open_drive: Write<'py, f32>,
    slow: Write<'py, f32>,
}

/// New tokens x `[B, t, D]`, whose output goes to y; brief: whether the router computes in bfloat16.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Tokens<'py> {
    x: Read<'py, f32>,
    y: Write<'py, f32>,
    starts: Vec<usize>,
    counts: Vec<usize>,
    brief: bool,
}

fn three<T: Element>(array: &Read<'_, T>, name: &str) -> PyResult<[usize; 3]> {
    array.shape().try_into().map_err(|_| wrong(format!("{name} has {} dimensions, expected 3", array.ndim())))
}

/// What the routed experts add for new tokens of running sequences. Changes y and the state. Returns whether all demand was finite.
#[pyfunction]
pub fn mix_experts(
    py: Python<'_>,
    router: &Router,
    matrices: Matrices<'_>,
    mut state: Option<State<'_>>,
    mut tokens: Tokens<'_>,
    threads: usize,
) -> PyResult<bool> {
    let ([_, size, width], [slots, hidden, depth]) = (three(&tokens.x, "x")?, three(&matrices.w_in, "w_in")?);
    if depth != width
        || slots != router.router.slots()
        || matrices.w_out.shape() != [slots, width, hidden]
        || tokens.y.shape() != tokens.x.shape()
    {
        return Err(wrong(format!("experts [{slots}, {hidden}, {depth}] and tokens {:?} do not fit", tokens.x.shape())));
    }
    let held = match &mut state {
        Some(State { calcium, vesicles, open_drive, slow }) => Held {
            calcium: calcium.as_slice_mut()?,
            vesicles: vesicles.as_slice_mut()?,
            open_drive: open_drive.as_slice_mut()?,
            slow: slow.as_slice_mut()?,
        },
        None => Held { calcium: &mut [], vesicles: &mut [], open_drive: &mut [], slow: &mut [] },
    };
    let probes: Vec<&[f32]> = matrices.probes.iter().map(|probe| probe.as_slice()).collect::<Result<_, _>>()?;
    let (x, weight, y) = (tokens.x.as_slice()?, matrices.router.as_slice()?, tokens.y.as_slice_mut()?);
    let (starts, counts, brief) = (&tokens.starts[..], &tokens.counts[..], tokens.brief);
    let bank = Bank { w_in: matrices.w_in.as_slice()?, w_out: matrices.w_out.as_slice()?, slots, width, hidden };
    let router = &router.router;
    guarded(py, || {
        let tokens = route::Tokens { x, weight, probes: &probes, starts, counts, size, width, brief };
        let (pairs, finite) = router.route(&tokens, held, threads)?;
        bank.mix(x, &pairs, y, threads)?;
        Ok(finite)
    })
}

/// A route of S tokens, as `Choices` takes it.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Route<'py> {
    x: Read<'py, f32>,
    expert: Read<'py, i64>,
    gates: Read<'py, f32>,
    bare: Read<'py, f32>,
    separate: Read<'py, f32>,
    winner: Read<'py, i64>,
    child: Read<'py, i64>,
}

/// Arrays to be filled, as in `Sums`.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Totals<'py> {
    load: Write<'py, f32>,
    demand: Write<'py, f32>,
    gates: Write<'py, f32>,
    both: Write<'py, f32>,
    together: Write<'py, f32>,
    inputs: Write<'py, f32>,
    common: Write<'py, f32>,
}

/// Statistics of a route, written to `totals`.
#[pyfunction]
pub fn routing_sums(py: Python<'_>, route: Route<'_>, mut totals: Totals<'_>, threads: usize) -> PyResult<()> {
    let (expert, winner, child) = (indices(&route.expert)?, indices(&route.winner)?, indices(&route.child)?);
    let two = |shape: &[usize]| shape.get(1).copied().ok_or_else(|| wrong("x and expert need two dimensions"));
    let (k, width) = (two(route.expert.shape())?, two(route.x.shape())?);
    let (x, gates, bare, separate) = (route.x.as_slice()?, route.gates.as_slice()?, route.bare.as_slice()?, route.separate.as_slice()?);
    let sums = Sums {
        load: totals.load.as_slice_mut()?,
        demand: totals.demand.as_slice_mut()?,
        gates: totals.gates.as_slice_mut()?,
        both: totals.both.as_slice_mut()?,
        together: totals.together.as_slice_mut()?,
        inputs: totals.inputs.as_slice_mut()?,
        common: totals.common.as_slice_mut()?,
    };
    let choices = Choices { x, expert: &expert, gates, bare, separate, winner: &winner, child: &child, k, width };
    guarded(py, || choices.sum(sums, threads))
}

/// The buffers of an account that a step changes or reads.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Kept<'py> {
    alive: Read<'py, bool>,
    lead: Read<'py, i64>,
    child: Read<'py, i64>,
    age: Write<'py, i64>,
    energy: Write<'py, f32>,
    balance: Write<'py, f32>,
    blend: Write<'py, f32>,
    tie: Write<'py, f32>,
    load: Write<'py, f32>,
    demand: Write<'py, f32>,
    both: Write<'py, f32>,
    together: Write<'py, f32>,
    inputs: Write<'py, f32>,
    common: Write<'py, f32>,
}

/// Sums of one step, as in `Step`.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Found<'py> {
    tokens: f32,
    load: Read<'py, f32>,
    demand: Read<'py, f32>,
    both: Read<'py, f32>,
    together: Read<'py, f32>,
    inputs: Read<'py, f32>,
    common: Read<'py, f32>,
}

#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Knobs {
    k: f32,
    bank_rate: f32,
    bank_decay: f32,
    balance_rate: f32,
    youth: f32,
    average: f32,
    tie_rate: f32,
    pull: f32,
    push: f32,
    estrange: f32,
}

/// Apply the statistics of one training step to a layer: its accounts, its identities `[E, d]` if it has them, its router `[E, D]`.
#[pyfunction]
pub fn settle_accounts(
    py: Python<'_>,
    mut kept: Kept<'_>,
    found: Found<'_>,
    mut identity: Option<Write<'_, f32>>,
    mut router: Write<'_, f32>,
    knobs: Knobs,
) -> PyResult<()> {
    let (lead, child) = (indices(&kept.lead)?, indices(&kept.child)?);
    let mut book = Book {
        alive: kept.alive.as_slice()?,
        lead: &lead,
        child: &child,
        age: kept.age.as_slice_mut()?,
        energy: kept.energy.as_slice_mut()?,
        balance: kept.balance.as_slice_mut()?,
        blend: kept.blend.as_slice_mut()?,
        tie: kept.tie.as_slice_mut()?,
        load: kept.load.as_slice_mut()?,
        demand: kept.demand.as_slice_mut()?,
        both: kept.both.as_slice_mut()?,
        together: kept.together.as_slice_mut()?,
        inputs: kept.inputs.as_slice_mut()?,
        common: kept.common.as_slice_mut()?,
    };
    let step = Step {
        tokens: found.tokens,
        load: found.load.as_slice()?,
        demand: found.demand.as_slice()?,
        both: found.both.as_slice()?,
        together: found.together.as_slice()?,
        inputs: found.inputs.as_slice()?,
        common: found.common.as_slice()?,
    };
    let Knobs { k, bank_rate, bank_decay, balance_rate, youth, average, tie_rate, pull, push, estrange } = knobs;
    let rates = Rates { k, bank_rate, bank_decay, balance_rate, youth, average, tie_rate };
    let identity = identity.as_mut().map(|identity| identity.as_slice_mut()).transpose()?;
    let rows = router.as_slice_mut()?;
    guarded(py, || {
        book.settle(&step, &rates)?;
        identity.map_or(Ok(()), |identity| book.contrast(identity, pull, push))?;
        book.estrange(rows, estrange)
    })
}
