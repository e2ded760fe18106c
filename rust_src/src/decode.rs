//! One new token per row: a pass over the cache that makes the output, collects the drive and ends ticks.
//!
//! The keys of a head are cut into splits of fixed size, so that the result depends neither on the number of threads nor on
//! the neighbours in the batch.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::dot::{Dots, TOGETHER, apart};
use crate::layer::{Arrival, Barrier, Cache, Running, Site};
use crate::math::{exp, fma, peak_of, weigh};
use crate::parallel::{Shared, for_each};
use crate::presyn::{self, Collect, Terminal};
use crate::simd::{Work, fastest};
use crate::tile::Number;

/// Keys of a split, and of a block whose keys and values stay in the first-level cache for all heads of a group.
const SPLIT: usize = 256;
const BLOCK: usize = 256;

/// Attention of the new tokens, one per row; `running` and `y` change. Returns whether all logits were finite.
///
/// # Errors
/// When a size does not fit, in words.
pub fn step<T: Number>(site: &Site, cache: &Cache<T>, mut running: Running, new: Arrival, threads: usize) -> Result<bool, String> {
    site.check(cache, &running, &new)?;
    if new.size != 1 {
        return Err(format!("{} new tokens per row: a decoding step takes one", new.size));
    }
    site.charge(&mut running, &new, cache.length);
    let q: Vec<f32> = new.q.iter().map(|x| x * site.scale).collect();
    let splits = new.starts.iter().max().map_or(0, |last| last / SPLIT + 1);
    let width = site.dim + 2;
    let mut parts = vec![0.0f32; new.starts.len() * site.heads * splits * width];
    let finite = AtomicBool::new(true);
    let shared = Parts {
        calcium: Shared::new(running.calcium),
        vesicles: Shared::new(running.vesicles),
        open: Shared::new(running.open_drive),
        beta: Shared::new(running.beta),
        sums: Shared::new(&mut parts),
    };
    for_each(threads, new.starts.len() * site.kv_heads * splits, |item| {
        let (source, split) = (item / splits, item % splits);
        let piece = Piece {
            site,
            cache,
            q: &q,
            level: running.level,
            shared: &shared,
            source,
            now: new.starts[source / site.kv_heads],
            split,
            splits,
        };
        if !piece.work() {
            finite.store(false, Ordering::Relaxed);
        }
    });
    for (y, parts) in new.y.chunks_exact_mut(site.dim).zip(parts.chunks_exact(splits * width)) {
        join(y, parts);
    }
    Ok(finite.into_inner())
}

/// Output of one head from its splits: peak, sum and weighted values each; splits without a key in sight have sum 0.
fn join(y: &mut [f32], parts: &[f32]) {
    let width = y.len() + 2;
    let seen = || parts.chunks_exact(width).filter(|part| part[1] != 0.0);
    let peak = seen().map(|part| part[0]).fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    y.fill(0.0);
    for part in seen() {
        let weight = exp::<false>(part[0] - peak);
        total += weight * part[1];
        y.iter_mut().zip(&part[2..]).for_each(|(y, x)| *y += weight * x);
    }
    y.iter_mut().for_each(|y| *y /= total);
}

/// What items of work change, each its own parts.
struct Parts<'a> {
    calcium: Shared<'a, f32>,
    vesicles: Shared<'a, f32>,
    open: Shared<'a, f32>,
    beta: Shared<'a, f32>,
    sums: Shared<'a, f32>,
}

/// One split of the keys of one key head (`source`, counted over the batch), for all query heads that share it.
struct Piece<'a, T> {
    site: &'a Site,
    cache: &'a Cache<'a, T>,
    q: &'a [f32],
    level: &'a [f64],
    shared: &'a Parts<'a>,
    source: usize,
    now: usize,
    split: usize,
    splits: usize,
}

impl<T: Number> Piece<'_, T> {
    /// Returns whether all logits were finite.
    fn work(self) -> bool {
        let (site, now) = (self.site, self.now);
        let (start, stop) = (self.split * SPLIT, (self.split * SPLIT + SPLIT).min(now + 1));
        if start >= stop {
            return true;
        }
        let group = site.group();
        let low = start.max((now + 1).saturating_sub(site.window));
        let rows = self.source * group..(self.source + 1) * group;
        let mut finite = true;
        for begin in (low..stop).step_by(BLOCK) {
            for row in rows.clone() {
                let block = begin..stop.min(begin + BLOCK);
                finite &= if site.soft { self.block::<true>(row, block) } else { self.block::<false>(row, block) };
            }
        }
        if !site.terminals.is_empty() && (now + 1) % site.tick == 0 {
            for row in rows {
                self.end_tick(row, &site.terminals[row % site.heads], start..stop);
            }
        }
        finite
    }

    fn keys(&self, row: usize, keys: &Range<usize>) -> Range<usize> {
        row * self.cache.length + keys.start..row * self.cache.length + keys.end
    }

    fn block<const SOFT: bool>(&self, row: usize, keys: Range<usize>) -> bool {
        let (site, dim, head, now) = (self.site, self.site.dim, row % self.site.heads, self.now);
        let (at, count) = (self.source * self.cache.length * dim, keys.len());
        let span = at + keys.start * dim..at + keys.end * dim;
        let mut buffer = [0.0f32; BLOCK];
        let logits = &mut buffer[..count];
        fastest(Dots { q: &self.q[row * dim..][..dim], k: &self.cache.k[span.clone()], logits });
        if !site.terminals.is_empty() {
            let old = count.min(now - keys.start);
            // SAFETY: one item has the heads of its group and the keys of its split for itself.
            let (open, beta) = unsafe { (self.shared.open.part(self.keys(row, &keys)), self.shared.beta.part(self.keys(row, &keys))) };
            let share = 1.0 / site.tick as f32;
            fastest(Collect::<SOFT> { logits: &logits[..old], sum: &mut open[..old], theta: site.theta[head], share });
            fastest(Add { logits, bias: beta });
        }
        match site.barrier {
            Barrier::None => (),
            Barrier::Linear => {
                for (x, key) in logits.iter_mut().zip(keys) {
                    *x -= site.strength[head] * (now - key) as f32;
                }
            }
            Barrier::Gated => {
                let level = &self.level[row * self.cache.length..][..=now];
                let before = if now > 0 { level[now - 1] } else { 0.0 };
                fastest(Level { logits, level: &level[keys], before, strength: site.strength[head] });
            }
        }
        let width = dim + 2;
        let place = (row * self.splits + self.split) * width;
        // SAFETY: as above.
        let sums = unsafe { self.shared.sums.part(place..place + width) };
        fastest(Mix { logits, v: &self.cache.v[span], sums })
    }

    /// Take the terminals of one head over the end of a tick.
    fn end_tick(&self, row: usize, terminal: &Terminal, keys: Range<usize>) {
        let (keys, parts) = (self.keys(row, &keys), self.shared);
        // SAFETY: as in `block`.
        let (calcium, vesicles) = unsafe { (parts.calcium.part(keys.clone()), parts.vesicles.part(keys.clone())) };
        // SAFETY: as in `block`.
        let (open, beta) = unsafe { (parts.open.part(keys.clone()), parts.beta.part(keys)) };
        presyn::tick(terminal, calcium, vesicles, Some(open), None);
        presyn::tick(terminal, calcium, vesicles, None, Some(beta));
        open.fill(0.0);
    }
}

/// logits += bias.
struct Add<'a> {
    logits: &'a mut [f32],
    bias: &'a [f32],
}

impl Work for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F: bool>(self) {
        self.logits.iter_mut().zip(self.bias).for_each(|(x, b)| *x += b);
    }
}

/// logits += strength (level - before): the gated barrier.
struct Level<'a> {
    logits: &'a mut [f32],
    level: &'a [f64],
    before: f64,
    strength: f32,
}

impl Work for Level<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F: bool>(self) {
        for (x, level) in self.logits.iter_mut().zip(self.level) {
            *x = fma::<F>(self.strength, (level - self.before) as f32, *x);
        }
    }
}

/// Adds the values of a block to the sums (peak, total, weighted values) of its split.
struct Mix<'a, T> {
    logits: &'a mut [f32],
    v: &'a [T],
    sums: &'a mut [f32],
}

impl<T: Number> Work for Mix<'_, T> {
    type Output = bool;

    #[inline(always)]
    fn run<const F: bool>(self) -> bool {
        let (head, y) = self.sums.split_at_mut(2);
        let largest = peak_of(self.logits);
        let peak = if head[1] == 0.0 { largest } else { largest.max(head[0]) };
        let shrink = exp::<F>(head[0] - peak);
        head[0] = peak;
        head[1] = head[1] * shrink + weigh::<F>(self.logits, peak);
        y.iter_mut().for_each(|y| *y *= shrink);
        let dim = y.len();
        let mut rows = self.v.chunks_exact(dim * TOGETHER);
        let mut weights = self.logits.chunks_exact(TOGETHER);
        for (four, w) in (&mut rows).zip(&mut weights) {
            let [a, b, c, d] = apart(four, dim);
            for ((((y, a), b), c), d) in y.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                let sum = fma::<F>(w[1], b.widen(), fma::<F>(w[0], a.widen(), *y));
                *y = fma::<F>(w[3], d.widen(), fma::<F>(w[2], c.widen(), sum));
            }
        }
        for (v, &w) in rows.remainder().chunks_exact(dim).zip(weights.remainder()) {
            y.iter_mut().zip(v).for_each(|(y, x)| *y = fma::<F>(w, x.widen(), *y));
        }
        head[1].is_finite()
    }
}
