//! Statistics of routing, and the accounts of experts that are kept by them between training steps.
//!
//! The equations are those of `statistics` in `bio_inspired_nanochat/synaptic/moe.py` and of `structural/metabolism.py`. S tokens,
//! k choices, E slots, D width, d size of an identity.

use std::cmp::Ordering;

use crate::parallel::{Shared, for_each};
use crate::route::descending;
use crate::simd::{Work, fastest};

/// Columns that one item of work sums over all tokens.
const COLUMNS: usize = 64;

/// Where S tokens went: x `[S, D]`, expert and gates `[S, k]`, bare, separate and winner `[S, E]`; child `[E]`.
pub struct Choices<'a> {
    pub x: &'a [f32],
    pub expert: &'a [usize],
    pub gates: &'a [f32],
    pub bare: &'a [f32],
    pub separate: &'a [f32],
    pub winner: &'a [usize],
    pub child: &'a [usize],
    pub k: usize,
    pub width: usize,
}

/// Sums over tokens: `[E]` each; together `[E, E]`, inputs `[E, D]`, common `[D]`. What is there is replaced.
pub struct Sums<'a> {
    pub load: &'a mut [f32],
    pub demand: &'a mut [f32],
    pub gates: &'a mut [f32],
    pub both: &'a mut [f32],
    pub together: &'a mut [f32],
    pub inputs: &'a mut [f32],
    pub common: &'a mut [f32],
}

impl Choices<'_> {
    fn tokens(&self) -> usize {
        self.expert.len() / self.k
    }

    /// # Errors
    /// When a size does not fit or an index lies outside, in words.
    pub fn sum(&self, sums: Sums, threads: usize) -> Result<(), String> {
        let e = self.child.len();
        if self.k == 0 || self.k > e || self.width == 0 || self.expert.len() % self.k != 0 {
            return Err(format!("{} choices of {e} experts by {} and width {} do not fit", self.expert.len(), self.k, self.width));
        }
        let s = self.tokens();
        let by_slot = [self.bare.len(), self.separate.len(), self.winner.len()].iter().all(|&n| n == s * e);
        let outputs = [sums.load.len(), sums.demand.len(), sums.gates.len(), sums.both.len()].iter().all(|&n| n == e);
        let wide = sums.together.len() == e * e && sums.inputs.len() == e * self.width && sums.common.len() == self.width;
        if !by_slot || !outputs || !wide || self.x.len() != s * self.width || self.gates.len() != self.expert.len() {
            return Err("sizes of choices and sums do not fit".to_string());
        }
        if self.expert.iter().chain(self.winner).chain(self.child).any(|&i| i >= e) {
            return Err(format!("an index lies outside of {e} experts"));
        }
        self.count(sums.load, sums.demand, sums.both, sums.together);
        let mut gates = vec![0.0f64; e];
        self.expert.iter().zip(self.gates).for_each(|(&i, &gate)| gates[i] += f64::from(gate));
        sums.gates.iter_mut().zip(gates).for_each(|(to, sum)| *to = sum as f32);
        let (inputs, common) = (Shared::new(sums.inputs), Shared::new(sums.common));
        for_each(threads, self.width.div_ceil(COLUMNS), |item| {
            let (first, stop) = (item * COLUMNS, self.width.min((item + 1) * COLUMNS));
            let mut totals = vec![0.0f64; (e + 1) * (stop - first)];
            let (all, own) = totals.split_at_mut(stop - first);
            fastest(Columns { choices: self, first, all, own });
            // SAFETY: each item has its own columns.
            unsafe { common.part(first..stop) }.iter_mut().zip(&*all).for_each(|(to, &sum)| *to = sum as f32);
            for (i, own) in own.chunks_exact(stop - first).enumerate() {
                // SAFETY: as above.
                let to = unsafe { inputs.part(i * self.width + first..i * self.width + stop) };
                to.iter_mut().zip(own).for_each(|(to, &sum)| *to = sum as f32);
            }
        });
        Ok(())
    }

    fn count(&self, load: &mut [f32], demand: &mut [f32], both: &mut [f32], together: &mut [f32]) {
        let e = self.child.len();
        let mut counts = vec![0u64; 3 * e + e * e];
        let (loads, rest) = counts.split_at_mut(e);
        let (demands, rest) = rest.split_at_mut(e);
        let (boths, pairs) = rest.split_at_mut(e);
        let mut best = Vec::with_capacity(self.k);
        for token in 0..self.tokens() {
            let experts = &self.expert[token * self.k..(token + 1) * self.k];
            for &i in experts {
                loads[i] += 1;
                experts.iter().for_each(|&j| pairs[i * e + j] += 1);
            }
            let at = token * e..(token + 1) * e;
            let (bare, separate, winner) = (&self.bare[at.clone()], &self.separate[at.clone()], &self.winner[at]);
            let (least, apart) = (kth(bare, self.k, &mut best), kth(separate, self.k, &mut best));
            let above = bare.iter().filter(|&&score| descending(score, least) == Ordering::Less).count();
            let mut equals = self.k - above; // that are chosen, the first ones
            for i in 0..e {
                let order = descending(bare[i], least);
                if order == Ordering::Less || (order == Ordering::Equal && equals > 0) {
                    equals -= usize::from(order == Ordering::Equal);
                    demands[if winner[i] == i { i } else { self.child[i] }] += 1;
                }
                let child = self.child[i];
                boths[i] += u64::from(child != i && separate[i] >= apart && separate[child] >= apart);
            }
        }
        for (to, counts) in [(load, &*loads), (demand, &*demands), (both, &*boths), (together, &*pairs)] {
            to.iter_mut().zip(counts).for_each(|(to, &n)| *to = n as f32);
        }
    }
}

/// The k-th largest score; `best` is room for the k largest.
fn kth(scores: &[f32], k: usize, best: &mut Vec<f32>) -> f32 {
    best.clear();
    for &score in scores {
        let place = best.partition_point(|&other| descending(other, score) != Ordering::Greater);
        if place < k {
            best.truncate(k - 1);
            best.insert(place, score);
        }
    }
    best[k - 1]
}

/// Sums of the columns from `first` on over all tokens, and over those of each expert (`own`).
struct Columns<'a> {
    choices: &'a Choices<'a>,
    first: usize,
    all: &'a mut [f64],
    own: &'a mut [f64],
}

impl Work for Columns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F: bool>(self) {
        let (width, size) = (self.choices.width, self.all.len());
        let mut wide = [0.0f64; COLUMNS];
        for (row, experts) in self.choices.x.chunks_exact(width).zip(self.choices.expert.chunks_exact(self.choices.k)) {
            let wide = &mut wide[..size];
            wide.iter_mut().zip(&row[self.first..self.first + size]).for_each(|(to, &x)| *to = f64::from(x));
            self.all.iter_mut().zip(&*wide).for_each(|(to, x)| *to += x);
            for &i in experts {
                self.own[i * size..(i + 1) * size].iter_mut().zip(&*wide).for_each(|(to, x)| *to += x);
            }
        }
    }
}

/// Rates of `Book::settle`.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    pub k: f32,
    pub bank_rate: f32,
    pub bank_decay: f32,
    pub balance_rate: f32,
    pub youth: f32,
    /// Weight of the newest step in averages, and the step of the bias between twins.
    pub average: f32,
    pub tie_rate: f32,
}

/// The accounts of a layer, as in `synaptic/accounts.py`: `[E]` each; together `[E, E]`, inputs `[E, D]`, common `[D]`.
pub struct Book<'a> {
    pub alive: &'a [bool],
    pub lead: &'a [usize],
    pub child: &'a [usize],
    pub age: &'a mut [i64],
    pub energy: &'a mut [f32],
    pub balance: &'a mut [f32],
    pub blend: &'a mut [f32],
    pub tie: &'a mut [f32],
    pub load: &'a mut [f32],
    pub demand: &'a mut [f32],
    pub both: &'a mut [f32],
    pub together: &'a mut [f32],
    pub inputs: &'a mut [f32],
    pub common: &'a mut [f32],
}

/// Sums of one training step, sizes as in `Sums`.
pub struct Step<'a> {
    pub tokens: f32,
    pub load: &'a [f32],
    pub demand: &'a [f32],
    pub both: &'a [f32],
    pub together: &'a [f32],
    pub inputs: &'a [f32],
    pub common: &'a [f32],
}

impl Book<'_> {
    fn check(&self, step: &Step) -> Result<(), String> {
        let (e, width) = (self.alive.len(), self.common.len());
        let own = [self.lead.len(), self.child.len(), self.age.len(), self.energy.len(), self.balance.len(), self.blend.len()];
        let more = [self.tie.len(), self.load.len(), self.demand.len(), self.both.len(), step.load.len(), step.demand.len()];
        let square = self.together.len() == e * e && step.together.len() == e * e && step.both.len() == e;
        let wide = self.inputs.len() == e * width && step.inputs.len() == e * width && step.common.len() == width;
        if own.iter().chain(&more).any(|&n| n != e) || !square || !wide {
            return Err("sizes of accounts and statistics do not fit".to_string());
        }
        if self.lead.iter().chain(self.child).any(|&i| i >= e) {
            return Err(format!("an index lies outside of {e} experts"));
        }
        Ok(())
    }

    fn leads(&self, slot: usize) -> bool {
        self.alive[slot] && self.lead[slot] == slot
    }

    /// Apply the statistics of one training step.
    ///
    /// # Errors
    /// When a size does not fit, in words.
    pub fn settle(&mut self, step: &Step, rates: &Rates) -> Result<(), String> {
        self.check(step)?;
        let (e, width) = (self.alive.len(), self.common.len());
        let living = self.alive.iter().filter(|&&alive| alive).count();
        let fair = rates.k * step.tokens / living as f32;
        let mean = |kept: &mut f32, new: f32| *kept += rates.average * (new - *kept);
        let loads: Vec<f32> = step.load.iter().map(|load| load / fair).collect();
        for (i, &load) in loads.iter().enumerate() {
            let demand = step.demand[i] / fair;
            let change = rates.bank_rate * (demand - 1.0) - rates.bank_decay * (self.energy[i] - 0.5);
            self.energy[i] = if self.alive[i] { (self.energy[i] + change).clamp(0.0, 1.0) } else { 0.5 };
            mean(&mut self.demand[i], demand);
            mean(&mut self.load[i], load);
            mean(&mut self.both[i], step.both[i] / step.tokens);
            self.age[i] += i64::from(self.alive[i]);
            let visits = step.load[i].max(1.0);
            let row = i * e..(i + 1) * e;
            self.together[row.clone()].iter_mut().zip(&step.together[row]).for_each(|(kept, new)| mean(kept, new / visits));
            if step.load[i] > 0.0 {
                let row = i * width..(i + 1) * width;
                self.inputs[row.clone()].iter_mut().zip(&step.inputs[row]).for_each(|(kept, new)| mean(kept, new / visits));
            }
        }
        self.common.iter_mut().zip(step.common).for_each(|(kept, new)| mean(kept, new / step.tokens));
        self.weigh_loads(&loads, rates);
        Ok(())
    }

    /// The balancing bias of every slot, and how far twins have grown apart. load: `[E]` in units of the fair share.
    fn weigh_loads(&mut self, load: &[f32], rates: &Rates) {
        let e = load.len();
        for (i, &own) in load.iter().enumerate() {
            let paired = self.child[i] != i;
            let younger = if paired { load[self.child[i]] } else { 0.0 };
            let gap = if paired { 2.0 } else { 1.0 } - (own + younger);
            if self.leads(i) && gap != 0.0 {
                self.balance[i] += rates.balance_rate * gap.signum();
            }
            self.blend[i] = if paired { (self.blend[i] + 1.0 / rates.youth).min(1.0) } else { 0.0 };
            let part = rates.tie_rate * (own - younger) / (own + younger).max(1e-6);
            self.tie[i] = if paired && self.blend[i] < 1.0 { self.tie[i] + part } else { 0.0 };
        }
        let leaders = (0..e).filter(|&i| self.leads(i)).count() as f32;
        let mean = (0..e).filter(|&i| self.leads(i)).map(|i| self.balance[i]).sum::<f32>() / leaders;
        for i in 0..e {
            self.balance[i] = if self.leads(i) { self.balance[i] - mean } else { 0.0 };
        }
    }

    /// Pull identities `[E, d]` of experts chosen together, push apart near ones that are not, along the sphere.
    ///
    /// # Errors
    /// When a size does not fit, in words.
    pub fn contrast(&self, identity: &mut [f32], pull: f32, push: f32) -> Result<(), String> {
        let e = self.alive.len();
        let dim = identity.len().checked_div(e).unwrap_or(0);
        if dim == 0 || identity.len() != e * dim || self.together.len() != e * e {
            return Err("sizes of identities and accounts do not fit".to_string());
        }
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let lengths: Vec<f32> = identity.chunks_exact(dim).map(|row| dot(row, row).sqrt()).collect();
        let unit: Vec<f32> =
            identity.chunks_exact(dim).zip(&lengths).flat_map(|(row, n)| row.iter().map(move |x| x / n.max(1e-12))).collect();
        let pair = |i: usize, j: usize| i != j && self.alive[i] && self.alive[j];
        let shared = |i: usize, j: usize| f32::midpoint(self.together[i * e + j], self.together[j * e + i]);
        let pairs: Vec<(usize, usize)> = (0..e * e).map(|at| (at / e, at % e)).filter(|&(i, j)| pair(i, j)).collect();
        let usual = pairs.iter().map(|&(i, j)| shared(i, j)).sum::<f32>() / (pairs.len().max(1) as f32);
        let mut along = vec![0.0; e * dim];
        for &(i, j) in &pairs {
            let (mine, other) = (&unit[i * dim..][..dim], &unit[j * dim..][..dim]);
            let (cosine, lift) = (dot(mine, other), shared(i, j) - usual);
            let weight = pull * lift.max(0.0) - push * (-lift).max(0.0) * cosine.max(0.0);
            for ((to, a), b) in along[i * dim..][..dim].iter_mut().zip(mine).zip(other) {
                *to += weight * (b - cosine * a);
            }
        }
        for (row, along) in identity.chunks_exact_mut(dim).zip(along.chunks_exact(dim)) {
            turn(row, along);
        }
        Ok(())
    }

    /// Turn the router rows `[E, D]` of twins apart along the difference of what each of them serves, by `rate` of their length.
    ///
    /// # Errors
    /// When a size does not fit, in words.
    pub fn estrange(&self, rows: &mut [f32], rate: f32) -> Result<(), String> {
        let width = self.common.len();
        if rows.len() != self.inputs.len() {
            return Err("sizes of router and accounts do not fit".to_string());
        }
        for i in 0..self.alive.len() {
            let other = if self.child[i] == i { self.lead[i] } else { self.child[i] };
            if other == i {
                continue;
            }
            let row = &mut rows[i * width..(i + 1) * width];
            let (mine, others) = (&self.inputs[i * width..][..width], &self.inputs[other * width..][..width]);
            let by: Vec<f32> = mine.iter().zip(others).map(|(a, b)| rate / (width as f32).sqrt() * (a - b)).collect();
            turn(row, &by);
        }
        Ok(())
    }
}

/// Move a row by shares of its length and give it that length again: steps as small as these would grow without bound.
fn turn(row: &mut [f32], by: &[f32]) {
    if by.iter().all(|&x| x == 0.0) {
        return;
    }
    let norm = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>().sqrt();
    let length = norm(row);
    row.iter_mut().zip(by).for_each(|(x, step)| *x += step * length);
    let scale = length / norm(row).max(1e-12);
    row.iter_mut().for_each(|x| *x *= scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kth_largest_counts_repetitions_and_nan_as_the_largest() {
        let of = |scores: &[f32], k| kth(scores, k, &mut Vec::new());
        assert_eq!((of(&[1.0, 3.0, 3.0, 2.0], 1), of(&[1.0, 3.0, 3.0, 2.0], 2), of(&[1.0, 3.0, 3.0, 2.0], 3)), (3.0, 3.0, 2.0));
        assert_eq!((of(&[1.0, f32::NAN, 3.0], 2), of(&[2.0, f32::NEG_INFINITY], 2)), (3.0, f32::NEG_INFINITY));
        assert!(of(&[1.0, f32::NAN], 1).is_nan());
    }

    #[test]
    fn sums_are_those_of_the_tokens_whatever_the_threads() {
        let (tokens, width) = (3, 70);
        let x: Vec<f32> = (0..tokens * width).map(|i| i as f32).collect();
        let bare = [3.0, 2.0, 1.0, 1.0, 2.0, 3.0, 3.0, 1.0, 3.0];
        let winner = [0, 1, 2, 2, 1, 2, 0, 1, 2];
        let choices = Choices {
            x: &x,
            expert: &[0, 1, 2, 1, 0, 2],
            gates: &[0.75, 0.25, 0.5, 0.5, 1.0, 0.0],
            bare: &bare,
            separate: &bare,
            winner: &winner,
            child: &[2, 1, 2],
            k: 2,
            width,
        };
        let go = |threads| {
            let mut all = vec![f32::NAN; 12 + 9 + 4 * width];
            let (four, rest) = all.split_at_mut(12);
            let [load, demand, gates, both] = four.chunks_mut(3).collect::<Vec<_>>().try_into().unwrap();
            let (together, rest) = rest.split_at_mut(9);
            let (inputs, common) = rest.split_at_mut(3 * width);
            choices.sum(Sums { load, demand, gates, both, together, inputs, common }, threads).unwrap();
            all
        };
        let all = go(1);
        assert_eq!(all[..6], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]);
        assert_eq!(all[6..12], [1.75, 0.75, 0.5, 1.0, 0.0, 0.0]);
        assert_eq!(all[12..21], [2.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 2.0]);
        assert_eq!(all[21 + 3 * width + 69], 69.0 + 139.0 + 209.0);
        assert_eq!(all[21 + width + 1], 1.0 + 71.0);
        assert_eq!(all, go(4));
        let empty =
            Sums { load: &mut [], demand: &mut [], gates: &mut [], both: &mut [], together: &mut [], inputs: &mut [], common: &mut [] };
        assert!(choices.sum(empty, 1).is_err());
    }

    #[test]
    fn any_stream_of_statistics_keeps_the_invariants() {
        let (e, width) = (5, 3);
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        let (alive, lead, child) = ([true, true, true, true, false], [0, 1, 2, 1, 4], [0, 3, 2, 3, 4]);
        let mut all = vec![0.0f32; 7 * e + e * e + e * width + width];
        let (mut age, mut identity, mut rows) = ([0i64; 5], vec![0.0f32; e * 4], vec![0.0f32; e * width]);
        identity.iter_mut().chain(&mut rows).for_each(|x| *x = random() - 0.5);
        let size = |rows: &[f32]| rows.iter().map(|x| x * x).sum::<f32>().sqrt();
        let born = (size(&identity), size(&rows));
        for _ in 0..300 {
            let (short, rest) = all.split_at_mut(7 * e);
            let [energy, balance, blend, tie, load, demand, both] = short.chunks_mut(e).collect::<Vec<_>>().try_into().unwrap();
            let (together, rest) = rest.split_at_mut(e * e);
            let (inputs, common) = rest.split_at_mut(e * width);
            let tokens = if random() < 0.3 { 1.0 } else { 1e4 * random() + 1.0 };
            let some = |n: usize, random: &mut dyn FnMut() -> f32| -> Vec<f32> {
                (0..n).map(|_| if random() < 0.3 { 0.0 } else { (tokens * random()).floor() }).collect()
            };
            let (load_, demand_, both_) = (some(e, &mut random), some(e, &mut random), some(e, &mut random));
            let together_: Vec<f32> = (0..e * e).map(|at| load_[at / e] * random()).collect();
            let inputs_: Vec<f32> = (0..e * width).map(|at| load_[at / width] * (random() - 0.5)).collect();
            let common_ = some(width, &mut random);
            let step =
                Step { tokens, load: &load_, demand: &demand_, both: &both_, together: &together_, inputs: &inputs_, common: &common_ };
            let (k, bank_rate, bank_decay, balance_rate) = (2.0, random(), random(), random());
            let rates = Rates { k, bank_rate, bank_decay, balance_rate, youth: 20.0, average: 0.05, tie_rate: 0.05 };
            let (alive, lead, child, age) = (&alive[..], &lead[..], &child[..], &mut age[..]);
            let mut book = Book { alive, lead, child, age, energy, balance, blend, tie, load, demand, both, together, inputs, common };
            book.settle(&step, &rates).unwrap();
            book.contrast(&mut identity, 0.1, 0.1).unwrap();
            book.estrange(&mut rows, 0.01).unwrap();
            assert!(book.energy.iter().all(|energy| (0.0..=1.0).contains(energy)) && book.energy[4] == 0.5);
            assert!(book.blend.iter().all(|blend| (0.0..=1.0).contains(blend)));
            let [a, b, c] = [0, 1, 2].map(|i| book.balance[i]);
            assert!((a + b + c).abs() < 1e-3 && book.balance[3..] == [0.0, 0.0], "{:?}", book.balance);
        }
        assert_eq!((age, all[2 * e + 1]), ([300, 300, 300, 300, 0], 1.0));
        assert!(all.iter().chain(&identity).chain(&rows).all(|x| x.is_finite()));
        assert!(
            (size(&identity) / born.0 - 1.0).abs() < 1e-4 && (size(&rows) / born.1 - 1.0).abs() < 1e-4,
            "directions turn, lengths stay"
        );
    }
}
