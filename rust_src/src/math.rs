//! Elementary functions on single numbers, written so that loops over slices of them vectorise.
//!
//! `F` says whether the target multiplies and adds in one instruction. NaN stays NaN in all of them.

/// a·b + c.
#[inline(always)]
pub fn fma<const F: bool>(a: f32, b: f32, c: f32) -> f32 {
    if F { a.mul_add(b, c) } else { a * b + c }
}

/// e^x with a relative error below 3e-7; x is taken as if limited to [-87, 88], so that the result is positive and finite.
#[inline(always)]
pub fn exp<const F: bool>(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 · 2^23: adding it leaves the nearest whole number in the low bits
    let x = x.clamp(-87.0, 88.0);
    let shifted = fma::<F>(x, std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = fma::<F>(n, -0.693_359_4, x);
    let r = fma::<F>(n, 2.121_944_4e-4, r);
    let mut p = fma::<F>(1.987_569_1e-4, r, 1.398_2e-3);
    p = fma::<F>(p, r, 8.333_452e-3);
    p = fma::<F>(p, r, 4.166_579_6e-2);
    p = fma::<F>(p, r, 1.666_666_5e-1);
    p = fma::<F>(p, r, 0.5);
    p = fma::<F>(p, r * r, r) + 1.0;
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()))
}

/// log x of a normal x > 0: absolute error below 3e-7, and relative error below 3e-7 where |log x| > 1; NaN for infinity.
#[inline(always)]
pub fn ln<const F: bool>(x: f32) -> f32 {
    const ROOT_HALF: u32 = 0x3f35_04f3;
    let bits = x.to_bits().wrapping_sub(ROOT_HALF);
    let e = (bits as i32 >> 23) as f32;
    let m = f32::from_bits((bits & 0x007f_ffff) + ROOT_HALF) - 1.0;
    let mut p = fma::<F>(7.037_683_6e-2, m, -1.151_461e-1);
    p = fma::<F>(p, m, 1.167_699_9e-1);
    p = fma::<F>(p, m, -1.242_014_1e-1);
    p = fma::<F>(p, m, 1.424_932_3e-1);
    p = fma::<F>(p, m, -1.666_805_8e-1);
    p = fma::<F>(p, m, 2.000_071_5e-1);
    p = fma::<F>(p, m, -2.499_999_4e-1);
    p = fma::<F>(p, m, 3.333_333e-1);
    let square = m * m;
    let mut y = p * square * m;
    y = fma::<F>(e, -2.121_944_4e-4, y);
    y = fma::<F>(-0.5, square, y);
    let trouble = x * 0.0; // 0, or NaN for NaN and infinity
    fma::<F>(e, 0.693_359_4, m + y) + trouble
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid<const F: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<F>(-x))
}

/// tanh x with an absolute error below 3e-7; exactly 0 at 0.
#[inline(always)]
pub fn tanh<const F: bool>(x: f32) -> f32 {
    1.0 - 2.0 / (exp::<F>(2.0 * x.clamp(-20.0, 20.0)) + 1.0)
}

/// log(1 + e^x) without loss of small values (Kahan's form of log1p).
#[inline(always)]
pub fn softplus<const F: bool>(x: f32) -> f32 {
    let small = exp::<F>(-x.abs());
    let above = 1.0 + small;
    let exact = above == 1.0;
    let below = if exact { 1.0 } else { above - 1.0 };
    let log = if exact { small } else { ln::<F>(above) * small / below };
    x.max(0.0) + log
}

/// Calcium drive of a logit above threshold: 0 below -1, (x+1)²/4 in between, x above 1.
///
/// The operations and their order are those of the PyTorch reference, so that both round alike.
#[inline(always)]
pub fn phi(x: f32) -> f32 {
    let ramp = (x + 1.0).clamp(0.0, 2.0);
    ramp * ramp / 4.0 + (x - 1.0).max(0.0)
}

const LANES: usize = 16;

/// The largest number, ignoring NaN; minus infinity where there is none.
#[inline(always)]
pub fn peak_of(numbers: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut peaks = [f32::NEG_INFINITY; LANES];
    let chunks = numbers.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for l in 0..LANES {
            peaks[l] = larger(peaks[l], chunk[l]);
        }
    }
    peaks.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| larger(a, b))
}

/// Replace every x by e^(x - peak); returns their sum.
#[inline(always)]
pub fn weigh<const F: bool>(numbers: &mut [f32], peak: f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let mut chunks = numbers.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for l in 0..LANES {
            chunk[l] = exp::<F>(chunk[l] - peak);
            sums[l] += chunk[l];
        }
    }
    let mut sum = 0.0;
    for s in sums {
        sum += s;
    }
    for x in chunks.into_remainder() {
        *x = exp::<F>(*x - peak);
        sum += *x;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst(from: f64, to: f64, error: impl Fn(f32) -> f64) -> f64 {
        let steps = 200_000;
        (0..=steps).map(|i| error((from + (to - from) * f64::from(i) / f64::from(steps)) as f32)).fold(0.0, f64::max)
    }

    fn keeps_its_errors<const F: bool>() {
        let exp_error = worst(-86.9, 87.9, |x| (f64::from(exp::<F>(x)) / f64::from(x).exp() - 1.0).abs());
        assert!(exp_error < 3e-7, "exp {exp_error:e}");
        let ln_error = worst(-69.0, 80.0, |x| {
            let x = f64::from(x).exp() as f32;
            let want = f64::from(x).ln();
            (f64::from(ln::<F>(x)) - want).abs() / want.abs().max(1.0)
        });
        assert!(ln_error < 3e-7, "ln {ln_error:e}");
        let tanh_error = worst(-30.0, 30.0, |x| (f64::from(tanh::<F>(x)) - f64::from(x).tanh()).abs());
        assert!(tanh_error < 3e-7, "tanh {tanh_error:e}");
        let softplus_error = worst(-80.0, 80.0, |x| (f64::from(softplus::<F>(x)) / f64::from(x).exp().ln_1p() - 1.0).abs());
        assert!(softplus_error < 2e-6, "softplus {softplus_error:e}");
    }

    #[test]
    fn errors_stay_within_what_is_stated() {
        keeps_its_errors::<true>();
        keeps_its_errors::<false>();
    }

    #[test]
    fn exact_points_are_exact_and_nan_stays() {
        assert_eq!((exp::<true>(0.0), ln::<true>(1.0), tanh::<true>(0.0), sigmoid::<true>(0.0)), (1.0, 0.0, 0.0, 0.5));
        for f in [exp::<true>, ln::<true>, tanh::<true>, sigmoid::<true>, softplus::<true>, phi] {
            assert!(f(f32::NAN).is_nan());
        }
        assert!(exp::<false>(1e30).is_finite() && exp::<false>(-1e30) > 0.0);
    }

    #[test]
    fn drive_is_silent_far_below_threshold_and_linear_far_above() {
        assert_eq!((phi(-1.0), phi(f32::NEG_INFINITY), phi(7.5), phi(f32::INFINITY)), (0.0, 0.0, 7.5, f32::INFINITY));
    }

    #[test]
    fn value_and_slope_of_the_drive_are_continuous_at_both_joints() {
        let h = 1e-3;
        for (joint, value, slope) in [(-1.0, 0.0, 0.0), (1.0, 1.0, 1.0)] {
            assert_eq!(phi(joint), value);
            let (left, right) = ((phi(joint) - phi(joint - h)) / h, (phi(joint + h) - phi(joint)) / h);
            assert!((left - slope).abs() < 2e-3 && (right - slope).abs() < 2e-3, "{joint}: {left} {right}");
        }
        assert_eq!(phi(0.0), 0.25);
    }
}
