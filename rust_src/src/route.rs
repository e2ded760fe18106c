//! Where the tokens of running sequences go in a mixture of experts, and what that leaves behind in the experts of each sequence.
//!
//! The equations are those of `bio_inspired_nanochat/synaptic/moe.py` and `expert_synapse.py`. B rows of the batch, t new tokens per
//! row, E slots, k choices, D width, d size of a code.

use std::cmp::Ordering;
use std::sync::atomic::{self, AtomicBool};

use crate::dot::Dots;
use crate::moe::Pair;
use crate::parallel::{Shared, for_each};
use crate::presyn::{self, Terminal};
use crate::simd::fastest;

/// Codes of all experts, unit vectors `[E, d]`, and the gain of their cosine with a token's probe.
#[derive(Clone, Debug)]
pub struct Codes {
    pub gain: f32,
    pub units: Vec<f32>,
    pub dim: usize,
}

/// What does not change from token to token: `[E]` unless said otherwise; empty where the router has no such part.
#[derive(Clone, Debug, Default)]
pub struct Router {
    pub k: usize,
    /// Tokens of a tick, and the number of experts that makes a share of one fair.
    pub tick: usize,
    pub fair: f32,
    pub alive: Vec<bool>,
    pub lead: Vec<usize>,
    pub child: Vec<usize>,
    /// What an account adds to a score, and what balancing adds.
    pub bank: Vec<f32>,
    pub balance: Vec<f32>,
    pub blend: Vec<f32>,
    pub tie: Vec<f32>,
    pub codes: Vec<Codes>,
    /// `[E, E]`: what the row's share takes from the column's logit.
    pub lateral: Vec<f32>,
    pub terminals: Vec<Terminal>,
    /// The same with both gains 1, for the release that scales an output, and the gain of that.
    pub plain: Vec<Terminal>,
    pub vesicle_gain: f32,
    /// Gain of the slow weight and what is left of it after a tick.
    pub nmda: Option<(f32, f32)>,
}

/// Experts of running sequences at the start of the open tick, `[B, E]` each; all empty where they remember nothing.
pub struct Held<'a> {
    pub calcium: &'a mut [f32],
    pub vesicles: &'a mut [f32],
    pub open_drive: &'a mut [f32],
    pub slow: &'a mut [f32],
}

/// New tokens x `[B, t, D]` and the matrices that read them: weight `[E, D]`, a probe `[d, D]` for each of the codes.
pub struct Tokens<'a> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub probes: &'a [&'a [f32]],
    pub starts: &'a [usize],
    pub counts: &'a [usize],
    pub size: usize,
    pub width: usize,
    /// Whether matrices and what they give are rounded to bfloat16.
    pub brief: bool,
}

/// The nearest bfloat16, ties to even.
fn rounded(x: f32) -> f32 {
    let bits = x.to_bits();
    if x.is_nan() { x } else { f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000) }
}

/// NaN comes first, as in PyTorch's sorting.
pub(crate) fn descending(a: f32, b: f32) -> Ordering {
    b.partial_cmp(&a).unwrap_or_else(|| b.is_nan().cmp(&a.is_nan()))
}

/// Indices of the k largest, largest first, equal ones by index.
fn top_k(scores: &[f32], k: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..scores.len()).collect();
    places.sort_by(|&a, &b| descending(scores[a], scores[b]));
    places.truncate(k);
    places
}

fn softmax(logits: &mut [f32]) {
    let peak = logits.iter().copied().fold(f32::NEG_INFINITY, |a, b| if b > a || b.is_nan() { b } else { a });
    logits.iter_mut().for_each(|x| *x = (*x - peak).exp());
    let sum: f32 = logits.iter().sum();
    logits.iter_mut().for_each(|x| *x /= sum);
}

impl Router {
    /// Places for experts, E.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.alive.len()
    }

    /// Whether experts have a state.
    #[must_use]
    pub fn remembers(&self) -> bool {
        !self.terminals.is_empty() || self.nmda.is_some()
    }

    /// What is wrong with the router itself, in words.
    ///
    /// # Errors
    /// The first part that does not fit.
    pub fn check(&self) -> Result<(), String> {
        let e = self.slots();
        let whole = [self.bank.len(), self.balance.len(), self.blend.len(), self.tie.len(), self.lead.len(), self.child.len()];
        let optional = [self.terminals.len(), self.plain.len()].iter().all(|&n| n == 0 || n == e);
        let codes = self.codes.iter().all(|codes| codes.dim > 0 && codes.dim.checked_mul(e) == Some(codes.units.len()));
        let inside = self.lead.iter().chain(&self.child).all(|&slot| slot < e);
        let lateral = self.lateral.is_empty() || self.lateral.len() == e * e;
        if whole.iter().any(|&n| n != e) || !optional || !codes || !inside || !lateral || self.tick == 0 || self.k == 0 || self.k > e {
            return Err("sizes of a router do not fit".to_string());
        }
        Ok(())
    }

    /// Choose for every real token of every row, in order; the state in `held` advances. Returns the pairs of all tokens in order,
    /// k each, and whether all demand was finite.
    ///
    /// # Errors
    /// When a size does not fit, in words.
    pub fn route(&self, tokens: &Tokens, held: Held, threads: usize) -> Result<(Vec<Pair>, bool), String> {
        self.check()?;
        tokens.check(self, &held)?;
        let (rows, e) = (tokens.starts.len(), self.slots());
        let mut pairs = vec![Pair { token: 0, expert: 0, gate: 0.0 }; rows * tokens.size * self.k];
        let finite = AtomicBool::new(true);
        let own = if self.remembers() { e } else { 0 };
        let (calcium, vesicles, open, slow) =
            (Shared::new(held.calcium), Shared::new(held.vesicles), Shared::new(held.open_drive), Shared::new(held.slow));
        let places = Shared::new(&mut pairs);
        for_each(threads, rows, |row| {
            let range = row * own..(row + 1) * own;
            // SAFETY: each item has a row of its own.
            let (calcium, vesicles) = unsafe { (calcium.part(range.clone()), vesicles.part(range.clone())) };
            // SAFETY: as above.
            let (open_drive, slow) = unsafe { (open.part(range.clone()), slow.part(range)) };
            // SAFETY: as above.
            let places = unsafe { places.part(row * tokens.size * self.k..(row + 1) * tokens.size * self.k) };
            let mut course = Course::new(self, Held { calcium, vesicles, open_drive, slow });
            if !course.row(tokens, row, places) {
                finite.store(false, atomic::Ordering::Relaxed);
            }
        });
        let real = |i: &usize| i / self.k % tokens.size < tokens.counts[i / self.k / tokens.size];
        let pairs = (0..pairs.len()).filter(real).map(|i| pairs[i]).collect();
        Ok((pairs, finite.into_inner()))
    }
}

impl Tokens<'_> {
    fn check(&self, router: &Router, held: &Held) -> Result<(), String> {
        let (rows, e) = (self.starts.len(), router.slots());
        let size = rows.checked_mul(self.size).and_then(|n| n.checked_mul(self.width));
        let states = [held.calcium.len(), held.vesicles.len(), held.open_drive.len(), held.slow.len()];
        let wanted = if router.remembers() { rows * e } else { 0 };
        let probes = self.probes.len() == router.codes.len()
            && self.probes.iter().zip(&router.codes).all(|(probe, codes)| Some(probe.len()) == codes.dim.checked_mul(self.width));
        let counts = self.counts.len() == rows && self.counts.iter().all(|&n| n > 0 && n <= self.size);
        let ends = self.starts.iter().all(|start| start.checked_add(self.size).is_some());
        if size != Some(self.x.len()) || Some(self.weight.len()) != e.checked_mul(self.width) || !probes || self.width == 0 {
            return Err("sizes of tokens and router do not fit".to_string());
        }
        if states.iter().any(|&n| n != wanted) || !counts || !ends {
            return Err("states, positions and counts do not fit the tokens".to_string());
        }
        Ok(())
    }

    /// A matrix of `out.len()` rows times x.
    fn project(&self, weight: &[f32], x: &[f32], out: &mut [f32]) {
        if self.brief {
            let weight: Vec<f32> = weight.iter().copied().map(rounded).collect();
            fastest(Dots { q: x, k: &weight[..], logits: &mut *out });
            out.iter_mut().for_each(|y| *y = rounded(*y));
        } else {
            fastest(Dots { q: x, k: weight, logits: out });
        }
    }
}

/// The experts of one sequence while its tokens are read. The effects are those of the open tick.
struct Course<'a> {
    router: &'a Router,
    held: Held<'a>,
    bias: Vec<f32>,
    released: Vec<f32>,
    probe: Vec<f32>,
    logit: Vec<f32>,
    share: Vec<f32>,
}

impl<'a> Course<'a> {
    fn new(router: &'a Router, held: Held<'a>) -> Self {
        let e = router.slots();
        let widest = router.codes.iter().map(|codes| codes.dim).max().unwrap_or(0);
        let (bias, released) = (vec![0.0; router.terminals.len()], vec![0.0; router.plain.len()]);
        let mut course = Course { router, held, bias, released, probe: vec![0.0; widest], logit: vec![0.0; e], share: vec![0.0; e] };
        course.open_tick();
        course
    }

    /// Returns whether all demand was finite.
    fn row(&mut self, tokens: &Tokens, row: usize, places: &mut [Pair]) -> bool {
        let (k, mut finite) = (self.router.k, true);
        for i in 0..tokens.counts[row] {
            let token = row * tokens.size + i;
            self.score(tokens, &tokens.x[token * tokens.width..][..tokens.width]);
            self.choose(token, &mut places[i * k..(i + 1) * k]);
            if self.router.remembers() {
                finite &= self.share.iter().all(|x| x.is_finite());
                let unit = self.router.fair / self.router.tick as f32;
                for (sum, &lead) in self.held.open_drive.iter_mut().zip(&self.router.lead) {
                    *sum += unit * self.share[lead];
                }
                if (tokens.starts[row] + i + 1) % self.router.tick == 0 {
                    self.end_tick();
                    self.open_tick();
                }
            }
        }
        finite
    }

    /// Logits of a token, with all that the experts' state does to them, and the share of its demand that goes to each slot.
    fn score(&mut self, tokens: &Tokens, x: &[f32]) {
        let router = self.router;
        tokens.project(tokens.weight, x, &mut self.logit);
        for (codes, probe) in router.codes.iter().zip(tokens.probes) {
            let found = &mut self.probe[..codes.dim];
            tokens.project(probe, x, found);
            let length = found.iter().map(|p| p * p).sum::<f32>().sqrt().max(1e-12);
            for (logit, unit) in self.logit.iter_mut().zip(codes.units.chunks_exact(codes.dim)) {
                let dot: f32 = unit.iter().zip(&*found).map(|(a, b)| a * b).sum();
                *logit += codes.gain * dot / length;
            }
        }
        for (slot, share) in self.share.iter_mut().enumerate() {
            let leads = router.alive[slot] && router.lead[slot] == slot;
            *share = if leads { self.logit[slot] } else { f32::NEG_INFINITY };
        }
        softmax(&mut self.share);
        for slot in 0..self.logit.len() {
            let plain = self.logit[slot];
            if !router.lateral.is_empty() {
                let row = &router.lateral[slot * self.share.len()..][..self.share.len()];
                self.logit[slot] -= row.iter().zip(&self.share).map(|(a, b)| a * b).sum::<f32>();
            }
            if let Some(bias) = self.bias.get(slot) {
                self.logit[slot] += bias;
            }
            if let Some((gain, _)) = router.nmda {
                self.logit[slot] += gain * self.held.slow[slot] / (1.0 + (-plain).exp());
            }
        }
    }

    /// The k best slots, the expert that serves each of them, and their gates.
    fn choose(&self, token: usize, places: &mut [Pair]) {
        let (router, logit) = (self.router, &self.logit);
        let e = logit.len();
        let (mut slot, mut winner) = (logit.clone(), vec![0; e]);
        for i in 0..e {
            let child = router.child[i];
            let younger = logit[child] - logit[i];
            let serves = child != i && younger + (1.0 - router.blend[i]) * router.tie[i] > 0.0;
            winner[i] = if serves { child } else { i };
            slot[i] += if serves { router.blend[i] * younger } else { 0.0 };
            if !(router.alive[i] && router.lead[i] == i) {
                slot[i] = f32::NEG_INFINITY;
            }
        }
        let score: Vec<f32> = (0..e).map(|i| slot[i] + router.bank[i] + router.balance[i]).collect();
        let chosen = top_k(&score, places.len());
        let mut gates: Vec<f32> = chosen.iter().map(|&i| slot[i]).collect();
        softmax(&mut gates);
        for ((place, &slot), gate) in places.iter_mut().zip(&chosen).zip(gates) {
            let expert = winner[slot];
            let released = self.released.get(slot).map(|own| own + router.blend[slot] * (self.released[expert] - own));
            *place = Pair { token, expert, gate: released.map_or(gate, |released| gate * released.exp()) };
        }
    }

    /// What the state does to the tokens of the tick that it begins.
    fn open_tick(&mut self) {
        let Held { calcium, vesicles, .. } = &mut self.held;
        let each = |terminals: &[Terminal], into: &mut [f32], calcium: &mut [f32], vesicles: &mut [f32]| {
            for (((terminal, b), c), r) in terminals.iter().zip(into.chunks_mut(1)).zip(calcium.chunks_mut(1)).zip(vesicles.chunks_mut(1)) {
                presyn::tick(terminal, c, r, None, Some(b));
            }
        };
        each(&self.router.terminals, &mut self.bias, calcium, vesicles);
        each(&self.router.plain, &mut self.released, calcium, vesicles);
        self.released.iter_mut().for_each(|released| *released *= self.router.vesicle_gain);
    }

    fn end_tick(&mut self) {
        let Held { calcium, vesicles, open_drive, slow } = &mut self.held;
        let state = calcium.chunks_mut(1).zip(vesicles.chunks_mut(1)).zip(open_drive.chunks(1));
        for (terminal, ((c, r), drive)) in self.router.terminals.iter().zip(state) {
            presyn::tick(terminal, c, r, Some(drive), None);
        }
        if let Some((_, decay)) = self.router.nmda {
            slow.iter_mut().zip(&**open_drive).for_each(|(slow, drive)| *slow = decay * *slow + (1.0 - decay) * drive);
        }
        open_drive.fill(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scores_go_by_index_and_nan_comes_first() {
        assert_eq!(top_k(&[1.0, 3.0, 3.0, 2.0], 3), [1, 2, 3]);
        assert_eq!(top_k(&[1.0, f32::NAN, 3.0, f32::NEG_INFINITY], 2), [1, 2]);
    }

    #[test]
    fn rounding_goes_to_the_nearest_bfloat16_and_to_even() {
        let of = |bits: u32| f32::from_bits(bits);
        assert_eq!(rounded(of(0x3f80_8000)), of(0x3f80_0000));
        assert_eq!(rounded(of(0x3f81_8000)), of(0x3f82_0000));
        assert_eq!(rounded(of(0x3f80_8001)), of(0x3f81_0000));
        assert!(rounded(f32::NAN).is_nan() && rounded(f32::INFINITY).is_infinite());
    }

    fn router(nmda: bool) -> Router {
        let e = 4;
        Router {
            k: 2,
            tick: 3,
            fair: 3.0,
            alive: vec![true, true, true, false],
            lead: vec![0, 1, 2, 3],
            child: vec![0, 1, 2, 3],
            bank: vec![0.0; e],
            balance: vec![0.0; e],
            blend: vec![0.0; e],
            tie: vec![0.0; e],
            nmda: nmda.then_some((0.5, 0.25)),
            ..Router::default()
        }
    }

    #[test]
    fn an_empty_slot_is_not_chosen_and_gates_sum_to_one() {
        let x = [1.0, -1.0, 0.5, 2.0];
        let weight = [0.1, 0.2, 0.3, -0.4, 0.5, 0.1, 9.0, 9.0];
        let tokens = Tokens { x: &x, weight: &weight, probes: &[], starts: &[5], counts: &[2], size: 2, width: 2, brief: false };
        let none = || Held { calcium: &mut [], vesicles: &mut [], open_drive: &mut [], slow: &mut [] };
        let (pairs, finite) = router(false).route(&tokens, none(), 2).unwrap();
        assert!(finite && pairs.len() == 4 && pairs.iter().all(|pair| pair.expert < 3));
        assert!(pairs.chunks(2).all(|two| (two[0].gate + two[1].gate - 1.0).abs() < 1e-6 && two[0].gate >= two[1].gate));
        assert!(router(true).route(&tokens, none(), 1).is_err());
    }

    #[test]
    fn any_cut_of_the_tokens_leads_to_the_same_state() {
        let x: Vec<f32> = (0..14).map(|i| ((i * 37 % 11) as f32 - 5.0) / 3.0).collect();
        let weight = [0.1, 0.2, 0.3, -0.4, 0.5, 0.1, 9.0, 9.0];
        let go = |cuts: &[usize]| {
            let mut state = vec![0.0; 16];
            state[4..8].fill(1.0);
            let (mut first, mut all) = (0, Vec::new());
            for &n in cuts {
                let [calcium, vesicles, open_drive, slow] = state.chunks_mut(4).collect::<Vec<_>>().try_into().unwrap();
                let x = &x[2 * first..2 * (first + n)];
                let tokens = Tokens { x, weight: &weight, probes: &[], starts: &[first], counts: &[n], size: n, width: 2, brief: false };
                let held = Held { calcium, vesicles, open_drive, slow };
                let (pairs, _) = router(true).route(&tokens, held, 1).unwrap();
                all.extend(pairs.iter().map(|pair| (pair.token + first, pair.expert, pair.gate)));
                first += n;
            }
            (all, state)
        };
        let whole = go(&[7]);
        assert!(whole.1[12..].iter().any(|&slow| slow > 0.0));
        assert_eq!(whole, go(&[1, 4, 2]));
    }
}
