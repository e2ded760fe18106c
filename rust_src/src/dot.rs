//! Products of a matrix in memory with a vector: four rows at a time, each read once.

use crate::math::fma;
use crate::simd::Work;
use crate::tile::Number;

const LANES: usize = 16;
/// Rows that are read side by side.
pub const TOGETHER: usize = 4;

/// logits = K q for rows of keys. A row's sum does not depend on its neighbours.
pub struct Dots<'a, T> {
    pub q: &'a [f32],
    pub k: &'a [T],
    pub logits: &'a mut [f32],
}

impl<T: Number> Work for Dots<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<const F: bool>(self) {
        let dim = self.q.len();
        let mut rows = self.k.chunks_exact(dim * TOGETHER);
        let mut places = self.logits.chunks_exact_mut(TOGETHER);
        for (four, place) in (&mut rows).zip(&mut places) {
            place.copy_from_slice(&dots::<T, F>(self.q, apart(four, dim)));
        }
        for (row, place) in rows.remainder().chunks_exact(dim).zip(places.into_remainder()) {
            *place = dots::<T, F>(self.q, [row; TOGETHER])[0];
        }
    }
}

#[inline(always)]
fn dots<T: Number, const F: bool>(q: &[f32], [a, b, c, d]: [&[T]; TOGETHER]) -> [f32; TOGETHER] {
    let chunks = |row| <[T]>::chunks_exact(row, LANES);
    let (mut sa, mut sb, mut sc, mut sd) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    for ((((x, a), b), c), d) in q.chunks_exact(LANES).zip(chunks(a)).zip(chunks(b)).zip(chunks(c)).zip(chunks(d)) {
        for l in 0..LANES {
            sa[l] = fma::<F>(x[l], a[l].widen(), sa[l]);
            sb[l] = fma::<F>(x[l], b[l].widen(), sb[l]);
            sc[l] = fma::<F>(x[l], c[l].widen(), sc[l]);
            sd[l] = fma::<F>(x[l], d[l].widen(), sd[l]);
        }
    }
    let mut totals = [total(&sa), total(&sb), total(&sc), total(&sd)];
    for i in q.len() / LANES * LANES..q.len() {
        for (sum, row) in totals.iter_mut().zip([a, b, c, d]) {
            *sum = fma::<F>(q[i], row[i].widen(), *sum);
        }
    }
    totals
}

/// Four rows of `dim` values.
#[inline(always)]
pub fn apart<T>(rows: &[T], dim: usize) -> [&[T]; TOGETHER] {
    let (a, rest) = rows.split_at(dim);
    let (b, rest) = rest.split_at(dim);
    let (c, d) = rest.split_at(dim);
    [a, b, c, d]
}

/// Sum of lanes, halves first.
#[inline(always)]
fn total(lanes: &[f32; LANES]) -> f32 {
    let (mut eight, mut four) = ([0.0f32; 8], [0.0f32; 4]);
    for l in 0..8 {
        eight[l] = lanes[l] + lanes[l + 8];
    }
    for l in 0..4 {
        four[l] = eight[l] + eight[l + 4];
    }
    (four[0] + four[2]) + (four[1] + four[3])
}
