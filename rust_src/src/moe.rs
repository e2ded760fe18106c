//! Top-k dispatch for a few tokens: the matrices of the chosen experts are read once each, in blocks of rows that threads share.
//!
//! S tokens, M (token, expert) pairs, E slots, D width, F hidden units.

use std::ops::Range;

use crate::dot::{Dots, TOGETHER};
use crate::parallel::{Shared, for_each};
use crate::simd::fastest;
use crate::tile::Number;

/// Numbers of a block of rows, which stays in the second-level cache for all tokens of a group.
const BLOCK: usize = 1 << 15;

/// The matrices of all experts: `w_in` `[E, F, D]`, `w_out` `[E, D, F]`.
#[derive(Clone, Copy)]
pub struct Bank<'a, T> {
    pub w_in: &'a [T],
    pub w_out: &'a [T],
    pub slots: usize,
    pub width: usize,
    pub hidden: usize,
}

/// A token, an expert that it visits, and the weight of what comes out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair {
    pub token: usize,
    pub expert: usize,
    pub gate: f32,
}

impl<T: Number> Bank<'_, T> {
    /// y `[S, D]`: the sum over a token's pairs of gate times `w_out` relu(`w_in` x)², zero for a token without one. x: `[S, D]`.
    ///
    /// # Errors
    /// When a size does not fit or an index lies outside, in words.
    pub fn mix(&self, x: &[f32], pairs: &[Pair], y: &mut [f32], threads: usize) -> Result<(), String> {
        let size = self.slots.checked_mul(self.width).and_then(|n| n.checked_mul(self.hidden));
        if size != Some(self.w_in.len()) || size != Some(self.w_out.len()) || x.len() != y.len() || self.width * self.hidden == 0 {
            return Err("sizes of experts, input and output do not fit".to_string());
        }
        let tokens = x.len() / self.width;
        if x.len() % self.width != 0 || pairs.iter().any(|pair| pair.token >= tokens || pair.expert >= self.slots) {
            return Err(format!("a pair lies outside of {tokens} tokens and {} experts", self.slots));
        }
        let mut order: Vec<usize> = (0..pairs.len()).collect();
        order.sort_by_key(|&place| pairs[place].expert);
        let groups: Vec<(usize, Range<usize>)> = runs(order.iter().map(|&place| pairs[place].expert));
        let mut hidden = vec![0.0; pairs.len() * self.hidden];
        let input = |i: usize| &x[pairs[order[i]].token * self.width..][..self.width];
        products(self.w_in, &groups, input, (self.hidden, self.width), &mut hidden, threads);
        hidden.iter_mut().for_each(|h| *h = if *h > 0.0 || h.is_nan() { *h * *h } else { 0.0 });
        let mut outputs = vec![0.0; pairs.len() * self.width];
        let input = |i: usize| &hidden[i * self.hidden..][..self.hidden];
        products(self.w_out, &groups, input, (self.width, self.hidden), &mut outputs, threads);
        let mut place = vec![0; order.len()];
        order.iter().enumerate().for_each(|(i, &pair)| place[pair] = i);
        y.fill(0.0);
        for (pair, &at) in pairs.iter().zip(&place) {
            let out = &outputs[at * self.width..][..self.width];
            y[pair.token * self.width..][..self.width].iter_mut().zip(out).for_each(|(y, out)| *y += pair.gate * out);
        }
        Ok(())
    }
}

/// Where equal neighbours lie.
fn runs(values: impl Iterator<Item = usize>) -> Vec<(usize, Range<usize>)> {
    let mut found: Vec<(usize, Range<usize>)> = Vec::new();
    for (i, value) in values.enumerate() {
        match found.last_mut() {
            Some((last, run)) if *last == value => run.end = i + 1,
            _ => found.push((value, i..i + 1)),
        }
    }
    found
}

/// Row i of `out` `[M, rows]` is the matrix `[rows, depth]` of the group of i times `input(i)`.
fn products<'a, T: Number>(
    weight: &[T],
    groups: &[(usize, Range<usize>)],
    input: impl Fn(usize) -> &'a [f32] + Sync,
    (rows, depth): (usize, usize),
    out: &mut [f32],
    threads: usize,
) {
    let block = (BLOCK / depth).max(1).next_multiple_of(TOGETHER);
    let blocks = rows.div_ceil(block);
    let out = Shared::new(out);
    for_each(threads, groups.len() * blocks, |item| {
        let (expert, members) = &groups[item / blocks];
        let (first, stop) = (item % blocks * block, rows.min((item % blocks + 1) * block));
        let k = &weight[(expert * rows + first) * depth..(expert * rows + stop) * depth];
        for i in members.clone() {
            // SAFETY: each item has rows of its own for every pair of its group.
            let logits = unsafe { out.part(i * rows + first..i * rows + stop) };
            fastest(Dots { q: input(i), k, logits });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(i: usize) -> f32 {
        ((i * 7919 % 61) as f32 - 30.0) / 32.0
    }

    #[test]
    fn a_token_gets_the_gated_sum_of_its_experts_whatever_the_threads() {
        let (slots, width, hidden) = (3, 5, 7);
        let w_in: Vec<f32> = (0..slots * width * hidden).map(number).collect();
        let w_out: Vec<f32> = (0..slots * width * hidden).map(|i| number(i + 11)).collect();
        let x: Vec<f32> = (0..4 * width).map(|i| number(i + 5)).collect();
        let bank = Bank { w_in: &w_in, w_out: &w_out, slots, width, hidden };
        let pair = |token, expert, gate| Pair { token, expert, gate };
        let pairs = [pair(0, 2, 0.25), pair(0, 0, 0.75), pair(1, 2, 1.0), pair(3, 1, 0.5), pair(3, 2, 0.5)];
        let mut wanted = vec![0.0f32; x.len()];
        for Pair { token, expert, gate } in pairs {
            for f in 0..hidden {
                let h: f32 = (0..width).map(|d| w_in[(expert * hidden + f) * width + d] * x[token * width + d]).sum();
                for d in 0..width {
                    wanted[token * width + d] += gate * w_out[(expert * width + d) * hidden + f] * h.max(0.0) * h.max(0.0);
                }
            }
        }
        let go = |threads| {
            let mut y = vec![f32::NAN; x.len()];
            bank.mix(&x, &pairs, &mut y, threads).unwrap();
            y
        };
        let y = go(1);
        assert!(y.iter().zip(&wanted).all(|(a, b)| (a - b).abs() < 1e-5), "{y:?} {wanted:?}");
        assert_eq!(y, go(3));
        assert!(bank.mix(&x, &[pair(4, 0, 1.0)], &mut y.clone(), 1).is_err());
        assert!(bank.mix(&x, &[pair(0, 3, 1.0)], &mut y.clone(), 1).is_err());
        assert!(bank.mix(&x[1..], &pairs, &mut y.clone(), 1).is_err());
    }
}
