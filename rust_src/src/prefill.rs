//! Many new tokens per row: the operators of whole sequences, and chunks of running ones, in blocks of queries of one tick.
//!
//! One item of work is one head of one row. Its keys and values are packed once; every block of queries then makes its logits
//! by a small matrix product, gives its drive, and mixes the values.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::layer::{Arrival, Barrier, Cache, Running, Site};
use crate::math::{peak_of, weigh};
use crate::parallel::{Shared, for_each};
use crate::presyn::{self, Collect};
use crate::simd::{Work, fastest};
use crate::split;
use crate::tile::{LANES, Number, Product, ROWS, pack_columns, pack_rows};

/// Most queries of a block.
const QUERIES: usize = 16;

/// Where the queries of a head stand.
#[derive(Clone, Copy)]
pub(crate) struct Reach {
    pub(crate) start: usize,
    pub(crate) count: usize,
    pub(crate) tick: usize,
    window: usize,
}

impl Reach {
    /// First key in sight of a query at `position`.
    pub(crate) fn low(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window)
    }

    /// Queries in blocks that lie in one tick each.
    pub(crate) fn blocks(self) -> impl Iterator<Item = Range<usize>> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let left = self.tick - (self.start + next) % self.tick;
            let block = next..self.count.min(next + left.min(QUERIES));
            next = block.end;
            (!block.is_empty()).then_some(block)
        })
    }
}

/// One head: its queries `[t, D]` times the scale, and its packed keys and values.
pub(crate) struct Head {
    pub(crate) reach: Reach,
    pub(crate) dim: usize,
    pub(crate) base: usize,
    pub(crate) q: Vec<f32>,
    pub(crate) keys: Vec<f32>,
    values: Vec<f32>,
}

/// The logits `[queries, width]` of a block of queries against the keys from `first` on, and what is made of them.
#[derive(Default)]
pub(crate) struct Scores {
    pub(crate) logits: Vec<f32>,
    mixed: Vec<f32>,
    pub(crate) first: usize,
    pub(crate) width: usize,
}

impl Scores {
    /// Make room for the keys that any query of a block can see.
    pub(crate) fn cover(&mut self, reach: &Reach, block: &Range<usize>) {
        self.first = reach.low(reach.start + block.start) / LANES * LANES;
        self.width = (reach.start + block.end).next_multiple_of(LANES) - self.first;
        self.logits.resize(QUERIES * self.width, 0.0);
    }

    /// Add the drive of a block's queries to `sum`, which has one value per key.
    fn collect<const SOFT: bool>(&self, reach: &Reach, block: &Range<usize>, theta: f32, share: f32, sum: &mut [f32]) {
        for (i, query) in block.clone().enumerate() {
            let position = reach.start + query;
            let seen = reach.low(position)..position;
            let logits = &self.logits[i * self.width..][seen.start - self.first..seen.end - self.first];
            fastest(Collect::<SOFT> { logits, sum: &mut sum[seen], theta, share });
        }
    }
}

impl Head {
    fn new<T: Number>(reach: Reach, dim: usize, q: &[f32], scale: f32, k: &[T], v: Option<&[T]>) -> Self {
        let base = reach.low(reach.start) / LANES * LANES;
        let stop = reach.start + reach.count;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        pack_columns(&k[base * dim..stop * dim], dim, &mut keys);
        if let Some(v) = v {
            pack_rows(&v[base * dim..stop * dim], dim, dim.next_multiple_of(LANES), &mut values);
            values.resize(keys.len() / dim * dim.next_multiple_of(LANES), 0.0);
        }
        let mut rows: Vec<f32> = q[..reach.count * dim].iter().map(|x| x * scale).collect();
        rows.resize((reach.count + ROWS) * dim, 0.0);
        Head { reach, dim, base, q: rows, keys, values }
    }

    /// Make the logits of a block of queries against all keys that any of them can see.
    fn score(&self, block: &Range<usize>, scores: &mut Scores) {
        scores.cover(&self.reach, block);
        let keys = scores.first..scores.first + scores.width;
        self.products(block, keys, &mut scores.logits, scores.width);
    }

    /// Logits of a block of queries against `keys`, both ends multiples of 16, to rows of `into` that are `stride` apart.
    pub(crate) fn products(&self, block: &Range<usize>, keys: Range<usize>, into: &mut [f32], stride: usize) {
        fastest(Product {
            a: &self.q[block.start * self.dim..],
            a_stride: self.dim,
            b: &self.keys[(keys.start - self.base) * self.dim..],
            b_stride: LANES,
            b_tile: self.dim * LANES,
            c: into,
            c_stride: stride,
            rows: block.len().next_multiple_of(ROWS),
            depth: self.dim,
            tiles: keys.len() / LANES,
        });
    }

    /// Turn a block's logits plus `bias` (one value per key) into outputs `y` [queries, D]. Returns whether they are finite.
    pub(crate) fn mix(&self, block: &Range<usize>, scores: &mut Scores, bias: Option<&[f32]>, y: &mut [f32]) -> bool {
        let Scores { logits: scored, mixed, first, width } = scores;
        let (first, width) = (*first, *width);
        let mut sums = [1.0f32; QUERIES];
        let rows = block.len().next_multiple_of(ROWS);
        for (i, query) in block.clone().enumerate() {
            let position = self.reach.start + query;
            let seen = self.reach.low(position)..position + 1;
            let row = &mut scored[i * width..][..width];
            row[..seen.start - first].fill(0.0);
            row[seen.end - first..].fill(0.0);
            let logits = &mut row[seen.start - first..seen.end - first];
            sums[i] = fastest(Weigh { logits, bias: bias.map(|bias| &bias[seen]) });
        }
        scored[block.len() * width..rows * width].fill(0.0);
        let padded = self.dim.next_multiple_of(LANES);
        mixed.resize(QUERIES * padded, 0.0);
        fastest(Product {
            a: scored,
            a_stride: width,
            b: &self.values[(first - self.base) * padded..],
            b_stride: padded,
            b_tile: LANES,
            c: mixed,
            c_stride: padded,
            rows,
            depth: width,
            tiles: padded / LANES,
        });
        for (i, y) in y.chunks_exact_mut(self.dim).enumerate() {
            y.iter_mut().zip(&mixed[i * padded..]).for_each(|(y, x)| *y = x / sums[i]);
        }
        sums.iter().all(|sum| sum.is_finite())
    }
}

/// logits + bias to weights relative to the largest; returns their sum.
struct Weigh<'a> {
    logits: &'a mut [f32],
    bias: Option<&'a [f32]>,
}

impl Work for Weigh<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<const F: bool>(self) -> f32 {
        if let Some(bias) = self.bias {
            self.logits.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
        let peak = peak_of(self.logits);
        weigh::<F>(self.logits, peak)
    }
}

/// The next chunk of every row against its cache; `running` and `y` change. Returns whether all logits were finite.
///
/// # Errors
/// When a size does not fit, in words.
pub fn chunk<T: Number>(site: &Site, cache: &Cache<T>, mut running: Running, new: Arrival, threads: usize) -> Result<bool, String> {
    site.check(cache, &running, &new)?;
    site.charge(&mut running, &new, cache.length);
    let (length, dim, heads) = (cache.length, site.dim, site.heads);
    let y = Shared::new(new.y);
    let states = [running.calcium, running.vesicles, running.open_drive, running.beta].map(Shared::new);
    let finite = AtomicBool::new(true);
    let items = new.starts.len() * heads;
    let apart = split::pays(items, threads);
    for_each(if apart { 1 } else { threads }, items, |row| {
        let (batch, head) = (row / heads, row % heads);
        let reach = Reach { start: new.starts[batch], count: new.counts[batch], tick: site.tick, window: site.window };
        let source = (batch * site.kv_heads + head / site.group()) * length * dim;
        let at = row * new.size * dim;
        let (k, v) = (&cache.k[source..][..length * dim], &cache.v[source..][..length * dim]);
        let work = Head::new(reach, dim, &new.q[at..], site.scale, k, Some(v));
        let own = if site.terminals.is_empty() { 0..0 } else { row * length..(row + 1) * length };
        // SAFETY: each item has a head of one row for itself.
        let ([calcium, vesicles, open, beta], y) =
            unsafe { (states.map(|state| state.part(own.clone())), y.part(at..at + reach.count * dim)) };
        let level = if running.level.is_empty() { &[][..] } else { &running.level[row * length..][..length] };
        let course = Course { site, head, level, offset: 0, calcium, vesicles, open, beta };
        if !(if apart { split::walk(course, &work, y, threads) } else { course.walk(&work, y) }) {
            finite.store(false, Ordering::Relaxed);
        }
    });
    Ok(finite.into_inner())
}

/// What one head keeps of its keys from `offset` on while a chunk is read; level belongs to all keys.
pub(crate) struct Course<'a> {
    pub(crate) site: &'a Site,
    pub(crate) head: usize,
    pub(crate) level: &'a [f64],
    pub(crate) offset: usize,
    pub(crate) calcium: &'a mut [f32],
    pub(crate) vesicles: &'a mut [f32],
    pub(crate) open: &'a mut [f32],
    pub(crate) beta: &'a mut [f32],
}

impl Course<'_> {
    fn walk(mut self, work: &Head, y: &mut [f32]) -> bool {
        let site = self.site;
        let plain = site.terminals.is_empty() && site.barrier == Barrier::None;
        let (mut bias, mut tick, mut finite) = (vec![0.0; work.reach.start + work.reach.count], usize::MAX, true);
        let mut scores = Scores::default();
        for block in work.reach.blocks() {
            work.score(&block, &mut scores);
            let position = work.reach.start + block.start;
            if tick != position / site.tick && !plain {
                tick = position / site.tick;
                self.bias_of(tick * site.tick, &mut bias);
            }
            if !site.terminals.is_empty() {
                let (theta, share) = (site.theta[self.head], 1.0 / site.tick as f32);
                if site.soft {
                    scores.collect::<true>(&work.reach, &block, theta, share, self.open);
                } else {
                    scores.collect::<false>(&work.reach, &block, theta, share, self.open);
                }
            }
            let outputs = &mut y[block.start * work.dim..block.end * work.dim];
            finite &= work.mix(&block, &mut scores, (!plain).then_some(&bias[..]), outputs);
            let end = work.reach.start + block.end;
            if end % site.tick == 0 && !site.terminals.is_empty() {
                self.end_tick(end);
            }
        }
        finite
    }

    /// Bias of every key in a tick: that of its terminal, and the barrier up to a constant that softmax cancels.
    pub(crate) fn bias_of(&self, first: usize, bias: &mut [f32]) {
        if self.beta.is_empty() {
            bias.fill(0.0);
        } else {
            bias.copy_from_slice(&self.beta[..bias.len()]);
        }
        match self.site.barrier {
            Barrier::None => (),
            Barrier::Linear => {
                for (j, b) in bias.iter_mut().enumerate() {
                    *b += self.site.strength[self.head] * ((self.offset + j) as f32 - first as f32);
                }
            }
            Barrier::Gated => {
                let from = self.level[first];
                for (b, level) in bias.iter_mut().zip(&self.level[self.offset..]) {
                    *b += self.site.strength[self.head] * (level - from) as f32;
                }
            }
        }
    }

    /// Take the terminals of the first `keys` keys over the end of a tick.
    pub(crate) fn end_tick(&mut self, keys: usize) {
        let terminal = &self.site.terminals[self.head];
        let (calcium, vesicles, open) = (&mut self.calcium[..keys], &mut self.vesicles[..keys], &mut self.open[..keys]);
        presyn::tick(terminal, calcium, vesicles, Some(open), None);
        presyn::tick(terminal, calcium, vesicles, None, Some(&mut self.beta[..keys]));
        open.fill(0.0);
    }
}

/// Queries against keys without a running state, for the single operators: q `[B, H, t, D]`, k `[B, Hkv, K, D]`.
pub struct Pairs<'a, T> {
    pub q: &'a [f32],
    pub k: &'a [T],
    pub starts: &'a [usize],
    pub counts: &'a [usize],
    pub size: usize,
    pub keys: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub tick: usize,
    pub window: usize,
    pub scale: f32,
}

impl<T: Number> Pairs<'_, T> {
    /// How many ticks the queries touch, at least one: the N of drive and bias must be as large.
    ///
    /// # Errors
    /// When a size does not fit, in words.
    pub fn ticks(&self) -> Result<usize, String> {
        let rows = self.starts.len();
        let sizes = [rows, self.heads, self.size, self.dim].iter().try_fold(1usize, |a, &b| a.checked_mul(b));
        let sources = [rows, self.kv_heads, self.keys, self.dim].iter().try_fold(1usize, |a, &b| a.checked_mul(b));
        let shape = sizes == Some(self.q.len()) && sources == Some(self.k.len()) && self.counts.len() == rows;
        if !shape || self.kv_heads == 0 || self.heads % self.kv_heads != 0 || self.tick == 0 || self.window == 0 || self.dim == 0 {
            return Err("sizes of queries and keys do not fit".to_string());
        }
        let mut most = 1;
        for (&start, &count) in self.starts.iter().zip(self.counts) {
            let inside = start.checked_add(count).is_some_and(|end| end <= self.keys);
            if count > self.size || !inside {
                return Err(format!("{count} of {} queries at position {start} do not fit {} keys", self.size, self.keys));
            }
            if count > 0 {
                most = most.max((start + count - 1) / self.tick - start / self.tick + 1);
            }
        }
        Ok(most)
    }

    fn head(&self, row: usize, v: Option<&[T]>) -> Head {
        let batch = row / self.heads;
        let reach = Reach { start: self.starts[batch], count: self.counts[batch], tick: self.tick, window: self.window };
        let source = batch * self.kv_heads + row % self.heads / (self.heads / self.kv_heads);
        let span = source * self.keys * self.dim..(source + 1) * self.keys * self.dim;
        let q = &self.q[row * self.size * self.dim..];
        Head::new(reach, self.dim, q, self.scale, &self.k[span.clone()], v.map(|v| &v[span]))
    }

    /// Add to `drive` `[B, H, N, K]` the sum over the queries t > j of each tick of φ(logit − θ); theta: `[H]`.
    ///
    /// # Errors
    /// When a size does not fit, in words.
    pub fn drive(&self, theta: &[f32], soft: bool, drive: &mut [f32], threads: usize) -> Result<(), String> {
        let rows = self.starts.len() * self.heads;
        let ticks = drive.len().checked_div(rows * self.keys).unwrap_or(0);
        if rows * self.keys == 0 || self.ticks()? > ticks || drive.len() != rows * ticks * self.keys || theta.len() != self.heads {
            return Err("sizes of drive and thresholds do not fit".to_string());
        }
        let drive = Shared::new(drive);
        for_each(threads, rows, |row| {
            let (work, mut scores) = (self.head(row, None), Scores::default());
            for block in work.reach.blocks() {
                work.score(&block, &mut scores);
                let n = (work.reach.start + block.start) / self.tick - work.reach.start / self.tick;
                let at = (row * ticks + n) * self.keys;
                // SAFETY: each item has a row of its own.
                let sum = unsafe { drive.part(at..at + self.keys) };
                let theta = theta[row % self.heads];
                if soft {
                    scores.collect::<true>(&work.reach, &block, theta, 1.0, sum);
                } else {
                    scores.collect::<false>(&work.reach, &block, theta, 1.0, sum);
                }
            }
        });
        Ok(())
    }

    /// Attention y `[B, H, t, D]` over values `[B, Hkv, K, D]` with the bias `[B, H, N, K]` of each tick, if there is one.
    ///
    /// # Errors
    /// When a size does not fit, in words.
    pub fn attend(&self, v: &[T], beta: Option<&[f32]>, y: &mut [f32], threads: usize) -> Result<(), String> {
        let rows = self.starts.len() * self.heads;
        let ticks = beta.map_or(0, |beta| beta.len().checked_div(rows * self.keys).unwrap_or(0));
        let fits = beta.is_none_or(|beta| beta.len() == rows * ticks * self.keys);
        let needed = self.ticks()?;
        if v.len() != self.k.len() || y.len() != self.q.len() || !fits || (beta.is_some() && needed > ticks) {
            return Err("sizes of values, bias and output do not fit".to_string());
        }
        let y = Shared::new(y);
        for_each(threads, rows, |row| {
            let (work, mut scores) = (self.head(row, Some(v)), Scores::default());
            let at = row * self.size * self.dim;
            // SAFETY: each item has a row of its own.
            let y = unsafe { y.part(at..at + work.reach.count * self.dim) };
            for block in work.reach.blocks() {
                work.score(&block, &mut scores);
                let n = (work.reach.start + block.start) / self.tick - work.reach.start / self.tick;
                let bias = beta.map(|beta| &beta[(row * ticks + n) * self.keys..][..self.keys]);
                work.mix(&block, &mut scores, bias, &mut y[block.start * self.dim..block.end * self.dim]);
            }
        });
        Ok(())
    }
}
