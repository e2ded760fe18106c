//! The presynaptic terminal.

/// Calcium drive of a logit above threshold: 0 below -1, (x+1)²/4 in between, x above 1. NaN stays NaN.
///
/// The operations and their order are those of the PyTorch reference, so that both round alike.
#[inline]
pub fn phi(x: f32) -> f32 {
    let ramp = (x + 1.0).clamp(0.0, 2.0);
    ramp * ramp / 4.0 + (x - 1.0).max(0.0)
}

/// `phi` of every element. Panics when the lengths differ.
pub fn phi_into(input: &[f32], output: &mut [f32]) {
    assert_eq!(input.len(), output.len());
    for (y, &x) in output.iter_mut().zip(input) {
        *y = phi(x);
    }
}

#[cfg(test)]
mod tests {
    use super::{phi, phi_into};

    #[test]
    fn drive_is_silent_far_below_threshold_and_linear_far_above() {
        assert_eq!(phi(-1.0), 0.0);
        assert_eq!(phi(f32::NEG_INFINITY), 0.0);
        assert_eq!(phi(7.5), 7.5);
        assert_eq!(phi(f32::INFINITY), f32::INFINITY);
        assert!(phi(f32::NAN).is_nan());
    }

    #[test]
    fn value_and_slope_are_continuous_at_both_joints() {
        let h = 1e-3;
        for (joint, value, slope) in [(-1.0, 0.0, 0.0), (1.0, 1.0, 1.0)] {
            assert_eq!(phi(joint), value);
            let left = (phi(joint) - phi(joint - h)) / h;
            let right = (phi(joint + h) - phi(joint)) / h;
            assert!(
                (left - slope).abs() < 2e-3 && (right - slope).abs() < 2e-3,
                "{joint}: {left} {right}"
            );
        }
        assert_eq!(phi(0.0), 0.25);
    }

    #[test]
    fn every_element_is_written() {
        let mut output = [f32::NAN; 4];
        phi_into(&[-2.0, 0.0, 1.0, 3.0], &mut output);
        assert_eq!(output, [0.0, 0.25, 1.0, 3.0]);
    }
}
