//! Small matrix products in single precision on packed operands. D head size, K keys.

use crate::math::fma;
use crate::simd::Work;

/// Columns of a tile, and what packed sizes are multiples of.
pub const LANES: usize = 16;
/// Rows of a tile.
pub const ROWS: usize = 4;

/// A number of a key or value cache.
pub trait Number: Copy + Send + Sync {
    /// As single precision.
    fn widen(self) -> f32;
}

impl Number for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

/// The upper half of a single-precision number: bfloat16.
impl Number for u16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
}

/// Rows `[K, D]` of keys in tiles of columns `[K / 16, D, 16]`, the last one filled up with zeros.
pub fn pack_columns<T: Number>(rows: &[T], dim: usize, into: &mut Vec<f32>) {
    let keys = rows.len() / dim;
    into.clear();
    into.resize(keys.div_ceil(LANES) * dim * LANES, 0.0);
    for (block, tile) in rows.chunks(LANES * dim).zip(into.chunks_exact_mut(LANES * dim)) {
        for (lane, row) in block.chunks_exact(dim).enumerate() {
            for (d, x) in row.iter().enumerate() {
                tile[d * LANES + lane] = x.widen();
            }
        }
    }
}

/// Rows `[K, D]` as `[K, width]`, each filled up with zeros.
pub fn pack_rows<T: Number>(rows: &[T], dim: usize, width: usize, into: &mut Vec<f32>) {
    into.clear();
    into.resize(rows.len() / dim * width, 0.0);
    for (row, packed) in rows.chunks_exact(dim).zip(into.chunks_exact_mut(width)) {
        packed.iter_mut().zip(row).for_each(|(y, x)| *y = x.widen());
    }
}

/// C = A B with A `[rows, depth]` (stride `a_stride`), rows a multiple of 4, and C `[rows, tiles · 16]` (stride `c_stride`).
///
/// The 16 columns of tile i lie at `b[i * b_tile + p * b_stride..]` for p in 0..depth.
pub struct Product<'a> {
    pub a: &'a [f32],
    pub a_stride: usize,
    pub b: &'a [f32],
    pub b_stride: usize,
    pub b_tile: usize,
    pub c: &'a mut [f32],
    pub c_stride: usize,
    pub rows: usize,
    pub depth: usize,
    pub tiles: usize,
}

impl Work for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F: bool>(self) {
        if self.depth == 0 {
            return;
        }
        for tile in 0..self.tiles {
            let b = &self.b[tile * self.b_tile..][..(self.depth - 1) * self.b_stride + LANES];
            for first in (0..self.rows).step_by(ROWS) {
                let a: [&[f32]; ROWS] = std::array::from_fn(|m| &self.a[(first + m) * self.a_stride..][..self.depth]);
                let mut sums = [[0.0f32; LANES]; ROWS];
                for p in 0..self.depth {
                    let columns: &[f32; LANES] = b[p * self.b_stride..][..LANES].try_into().expect("a full tile");
                    for (sum, row) in sums.iter_mut().zip(a) {
                        for (s, &x) in sum.iter_mut().zip(columns) {
                            *s = fma::<F>(row[p], x, *s);
                        }
                    }
                }
                for (m, sum) in sums.iter().enumerate() {
                    self.c[(first + m) * self.c_stride + tile * LANES..][..LANES].copy_from_slice(sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::fastest;

    #[test]
    fn a_product_of_packed_operands_is_the_product() {
        let (keys, dim, rows) = (19, 5, 8);
        let number = |i: usize| ((i * 7919 % 31) as f32 - 15.0) / 8.0;
        let k: Vec<f32> = (0..keys * dim).map(number).collect();
        let q: Vec<f32> = (0..rows * dim).map(|i| number(i + 3)).collect();
        let mut packed = Vec::new();
        pack_columns(&k, dim, &mut packed);
        let mut c = vec![f32::NAN; rows * 32];
        fastest(Product {
            a: &q,
            a_stride: dim,
            b: &packed,
            b_stride: LANES,
            b_tile: dim * LANES,
            c: &mut c,
            c_stride: 32,
            rows,
            depth: dim,
            tiles: 2,
        });
        for (i, row) in c.chunks_exact(32).enumerate() {
            for (j, &got) in row.iter().enumerate() {
                let want: f32 = if j < keys { (0..dim).map(|d| q[i * dim + d] * k[j * dim + d]).sum() } else { 0.0 };
                assert!((got - want).abs() < 1e-5, "{i} {j}: {got} {want}");
            }
        }
    }

    #[test]
    fn a_bfloat16_is_the_upper_half_of_a_float() {
        assert_eq!((0x3f80u16.widen(), 0xc040u16.widen()), (1.0, -3.0));
        let mut packed = Vec::new();
        pack_rows(&[0x3f80u16, 0x4000, 0x4040, 0x4080], 2, 3, &mut packed);
        assert_eq!(packed, [1.0, 2.0, 0.0, 3.0, 4.0, 0.0]);
    }
}
