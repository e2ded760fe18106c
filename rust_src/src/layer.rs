//! What the attention of one layer consists of, and the sizes that a call must have.
//!
//! B rows of the batch, H query heads, Hkv key heads, L cache length, D head size, t new tokens per row.

use crate::presyn::Terminal;
use crate::tile::Number;

/// A per-key penalty on distance: none, a slope per head, or the running cost of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Barrier {
    None,
    Linear,
    Gated,
}

/// What does not change from token to token.
#[derive(Clone, Debug)]
pub struct Site {
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub tick: usize,
    pub scale: f32,
    /// A query at t reads keys j with t - j < window.
    pub window: usize,
    /// Whether the drive is a softplus.
    pub soft: bool,
    /// `[H]` threshold and kinetics; both empty without terminals.
    pub theta: Vec<f32>,
    pub terminals: Vec<Terminal>,
    pub barrier: Barrier,
    /// `[H]` strength of the barrier, times the slope for the linear one; empty without.
    pub strength: Vec<f32>,
}

/// Keys and values, `[B, Hkv, L, D]` each.
#[derive(Clone, Copy)]
pub struct Cache<'a, T> {
    pub k: &'a [T],
    pub v: &'a [T],
    pub length: usize,
}

/// What a layer keeps of every key, `[B, H, L]` each, empty where the site has no such part.
pub struct Running<'a> {
    pub calcium: &'a mut [f32],
    pub vesicles: &'a mut [f32],
    pub open_drive: &'a mut [f32],
    pub beta: &'a mut [f32],
    /// Running sum of the gate's costs.
    pub level: &'a mut [f64],
}

/// New tokens: queries `[B, H, t, D]`, whose keys are in the cache, and where they stand.
pub struct Arrival<'a> {
    pub q: &'a [f32],
    /// `[B, H, t, D]` takes the output of the real tokens.
    pub y: &'a mut [f32],
    /// `[B, t, H]` logits of the gate, empty where there is none.
    pub gate: &'a [f32],
    /// `[B]` position of the first new token, and how many of the t are real.
    pub starts: &'a [usize],
    pub counts: &'a [usize],
    pub size: usize,
}

/// The product, or None when it overflows.
fn product(sizes: &[usize]) -> Option<usize> {
    sizes.iter().try_fold(1usize, |a, &b| a.checked_mul(b))
}

impl Site {
    /// Query heads that share a key head.
    #[must_use]
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// What is wrong with a call, in words.
    ///
    /// # Errors
    /// The first size that does not fit.
    pub fn check<T: Number>(&self, cache: &Cache<T>, running: &Running, new: &Arrival) -> Result<(), String> {
        let rows = new.starts.len();
        let fits = |name: &str, len: usize, wanted: &[usize]| match product(wanted) {
            Some(n) if n == len => Ok(()),
            _ => Err(format!("{name} has {len} values, expected {wanted:?}")),
        };
        let with = |name: &str, len: usize, present: bool| {
            let wanted = [rows, self.heads, cache.length];
            fits(name, len, if present { &wanted } else { &[0] })
        };
        if new.counts.len() != rows {
            return Err(format!("{} counts for {rows} starts", new.counts.len()));
        }
        fits("k", cache.k.len(), &[rows, self.kv_heads, cache.length, self.dim])?;
        fits("v", cache.v.len(), &[rows, self.kv_heads, cache.length, self.dim])?;
        fits("q", new.q.len(), &[rows, self.heads, new.size, self.dim])?;
        fits("y", new.y.len(), &[rows, self.heads, new.size, self.dim])?;
        let (alive, gated) = (!self.terminals.is_empty(), self.barrier == Barrier::Gated);
        with("calcium", running.calcium.len(), alive)?;
        with("vesicles", running.vesicles.len(), alive)?;
        with("open_drive", running.open_drive.len(), alive)?;
        with("beta", running.beta.len(), alive)?;
        with("barrier", running.level.len(), gated)?;
        let wanted = [rows, new.size, self.heads];
        fits("gate", new.gate.len(), if gated { &wanted } else { &[0] })?;
        for (&start, &count) in new.starts.iter().zip(new.counts) {
            let end = start.checked_add(count).filter(|&end| end <= cache.length);
            if count == 0 || count > new.size || end.is_none() {
                return Err(format!("{count} of {} tokens at position {start} do not fit a cache of {}", new.size, cache.length));
            }
        }
        Ok(())
    }

    /// Extend the running costs of the gate by the new tokens.
    pub fn charge(&self, running: &mut Running, new: &Arrival, length: usize) {
        if self.barrier != Barrier::Gated {
            return;
        }
        for (row, level) in running.level.chunks_exact_mut(length).enumerate() {
            let (batch, head) = (row / self.heads, row % self.heads);
            let (start, count) = (new.starts[batch], new.counts[batch]);
            let mut sum = if start > 0 { level[start - 1] } else { 0.0 };
            for (i, place) in level[start..start + count].iter_mut().enumerate() {
                let gate = f64::from(new.gate[(batch * new.size + i) * self.heads + head]);
                sum += (-gate).max(0.0) + (-gate.abs()).exp().ln_1p();
                *place = sum;
            }
        }
    }
}
