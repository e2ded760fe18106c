//! The core of the presynaptic terminal: calcium, vesicle pool, and the bias of attention that follows from them.
//!
//! The equations are those of `bio_inspired_nanochat/kernels/terminal.py`. H heads, N ticks, K keys.

use crate::math::{exp, fma, ln, phi, sigmoid, softplus, tanh};
use crate::parallel::{Shared, for_each};
use crate::simd::{Work, fastest};

const VANISHING: f32 = 1e-30;

/// Kinetics of the terminals of one head, times in tokens. One sensor is two equal ones.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kinetics {
    pub tau_c: f32,
    pub tau_rrp: f32,
    pub alpha_ca: f32,
    pub k_fast: f32,
    pub k_slow: f32,
    pub syt_mix: f32,
    pub syt_gain: f32,
    pub release_bias: f32,
    pub release_rate: f32,
    pub gain_release: f32,
    pub gain_depletion: f32,
}

/// What a tick of `Kinetics` needs.
#[derive(Clone, Copy, Debug)]
pub struct Terminal {
    kinetics: Kinetics,
    tick: f32,
    beta_max: f32,
    epsilon: f32,
    decay: f32,
    influx: f32,
    dock: f32,
}

impl Terminal {
    /// tick: tokens per tick; beta_max: limit of the bias (0: none); epsilon: floor inside the logarithm of a pool.
    #[must_use]
    pub fn new(kinetics: Kinetics, tick: usize, beta_max: f32, epsilon: f32) -> Self {
        let decay = (-(tick as f32) / kinetics.tau_c).exp();
        let influx = (1.0 - decay) * kinetics.tau_c * kinetics.alpha_ca;
        Terminal { kinetics, tick: tick as f32, beta_max, epsilon, decay, influx, dock: 1.0 / kinetics.tau_rrp }
    }

    #[inline(always)]
    fn probability<const F: bool>(&self, calcium: f32) -> f32 {
        let k = &self.kinetics;
        let (fast, slow) = (calcium + k.k_fast, calcium + k.k_slow);
        let syt = calcium * fma::<F>(k.syt_mix, slow - fast, fast) / (fast * slow);
        sigmoid::<F>(fma::<F>(k.syt_gain, syt, k.release_bias))
    }

    #[inline(always)]
    fn log_probability<const F: bool>(&self, probability: f32) -> f32 {
        ln::<F>(probability + VANISHING)
    }

    #[inline(always)]
    fn log_pool<const F: bool>(&self, pool: f32) -> f32 {
        ln::<F>(pool + self.epsilon)
    }
}

/// Terminals of one head over one tick: the bias from their state at its start, and, where asked, the state at its end.
struct Tick<'a, const LIMITED: bool> {
    terminal: &'a Terminal,
    calcium: &'a mut [f32],
    vesicles: &'a mut [f32],
    drive: Option<&'a [f32]>,
    beta: Option<&'a mut [f32]>,
}

impl<const LIMITED: bool> Tick<'_, LIMITED> {
    #[inline(always)]
    fn bias<const F: bool>(terminal: &Terminal, rest: (f32, f32), probability: f32, vesicles: f32) -> f32 {
        let k = &terminal.kinetics;
        let released = k.gain_release * (terminal.log_probability::<F>(probability) - rest.0);
        let beta = released + k.gain_depletion * (terminal.log_pool::<F>(vesicles) - rest.1);
        if LIMITED { terminal.beta_max * tanh::<F>(beta / terminal.beta_max) } else { beta }
    }

    #[inline(always)]
    fn ahead<const F: bool>(t: &Terminal, calcium: &mut f32, vesicles: &mut f32, probability: f32, drive: f32) {
        let rate = fma::<F>(t.kinetics.release_rate * probability, drive, t.dock);
        let target = t.dock / rate;
        *vesicles = fma::<F>(*vesicles - target, exp::<F>(-t.tick * rate), target);
        *calcium = fma::<F>(t.decay, *calcium, t.influx * drive);
    }
}

impl<const LIMITED: bool> Work for Tick<'_, LIMITED> {
    type Output = ();

    #[inline(always)]
    fn run<const F: bool>(self) {
        let t = *self.terminal;
        let rest = (t.log_probability::<F>(t.probability::<F>(0.0)), t.log_pool::<F>(1.0));
        let state = self.calcium.iter_mut().zip(self.vesicles);
        match (self.drive, self.beta) {
            (Some(drive), Some(beta)) => {
                for (((c, r), &i), b) in state.zip(drive).zip(beta) {
                    let p = t.probability::<F>(*c);
                    *b = Self::bias::<F>(&t, rest, p, *r);
                    Self::ahead::<F>(&t, c, r, p, i);
                }
            }
            (Some(drive), None) => {
                for ((c, r), &i) in state.zip(drive) {
                    let p = t.probability::<F>(*c);
                    Self::ahead::<F>(&t, c, r, p, i);
                }
            }
            (None, Some(beta)) => {
                for ((c, r), b) in state.zip(beta) {
                    *b = Self::bias::<F>(&t, rest, t.probability::<F>(*c), *r);
                }
            }
            (None, None) => (),
        }
    }
}

/// One tick of the terminals of a head: write the bias of the state that they are in, then let `drive` act on it.
///
/// All slices have one value per key; without `drive` the state stays, without `beta` no bias is made.
pub fn tick(terminal: &Terminal, calcium: &mut [f32], vesicles: &mut [f32], drive: Option<&[f32]>, beta: Option<&mut [f32]>) {
    if terminal.beta_max > 0.0 {
        fastest(Tick::<true> { terminal, calcium, vesicles, drive, beta });
    } else {
        fastest(Tick::<false> { terminal, calcium, vesicles, drive, beta });
    }
}

/// State of the terminals of all rows and heads, `[B, H, K]` each.
pub struct States<'a> {
    pub calcium: &'a mut [f32],
    pub vesicles: &'a mut [f32],
    pub open_drive: &'a mut [f32],
}

/// What `run` passes through: keys K, `[B]` how many of the ticks end, and whether key j is at rest before tick j / c, as in a
/// pass from position 0.
pub struct Course<'a> {
    pub keys: usize,
    pub closed: &'a [usize],
    pub young: bool,
}

/// Run all terminals over N ticks.
///
/// drive: `[B, H, N, K]`, to which the first tick adds `open_drive`. Fills beta `[B, H, N, K]` and leaves in `states` the start
/// of the open tick. Panics when sizes do not fit.
pub fn run(terminals: &[Terminal], drive: &[f32], beta: &mut [f32], states: States, course: &Course, threads: usize) {
    let Course { keys, closed, young } = *course;
    let (heads, rows) = (terminals.len(), terminals.len() * closed.len());
    assert!(drive.len() == beta.len() && [&states.calcium, &states.vesicles, &states.open_drive].iter().all(|s| s.len() == rows * keys));
    if rows * keys == 0 {
        return;
    }
    let ticks = drive.len() / (rows * keys);
    assert_eq!(drive.len(), rows * ticks * keys);
    let (beta, calcium, vesicles, open) =
        (Shared::new(beta), Shared::new(states.calcium), Shared::new(states.vesicles), Shared::new(states.open_drive));
    for_each(threads, rows, |row| {
        let (own, terminal) = (row * keys..(row + 1) * keys, &terminals[row % heads]);
        // SAFETY: each item has a row of its own.
        let (calcium, vesicles, open) = unsafe { (calcium.part(own.clone()), vesicles.part(own.clone()), open.part(own)) };
        for n in 0..ticks {
            let at = (row * ticks + n) * keys;
            // SAFETY: as above.
            let beta = unsafe { beta.part(at..at + keys) };
            let born = if young { keys.min((n + 1) * terminal.tick as usize) } else { keys };
            beta[born..].fill(0.0);
            let (calcium, vesicles, beta) = (&mut calcium[..born], &mut vesicles[..born], Some(&mut beta[..born]));
            let (new, ends) = (&drive[at..at + keys], n < closed[row / heads]);
            if ends && n > 0 {
                tick(terminal, calcium, vesicles, Some(&new[..born]), beta);
                continue;
            }
            open.iter_mut().zip(new).for_each(|(sum, i)| *sum += i);
            tick(terminal, calcium, vesicles, ends.then_some(&open[..born]), beta);
            if ends {
                open.fill(0.0);
            }
        }
    });
}

/// Adds the drive of a row of logits to what a tick has collected: sum += share · φ(scale · x − θ); `SOFT`: softplus as φ.
pub struct Collect<'a, const SOFT: bool> {
    pub logits: &'a [f32],
    pub sum: &'a mut [f32],
    pub theta: f32,
    pub share: f32,
}

impl<const SOFT: bool> Work for Collect<'_, SOFT> {
    type Output = ();

    #[inline(always)]
    fn run<const F: bool>(self) {
        for (sum, &x) in self.sum.iter_mut().zip(self.logits) {
            let x = x - self.theta;
            let raised = if SOFT { softplus::<F>(x) } else { phi(x) };
            *sum = fma::<F>(self.share, raised, *sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in [0, 1) from a linear congruence (Knuth's MMIX).
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> f32 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 40) as f32 / (1u64 << 24) as f32
        }

        /// Between two positive numbers, evenly in their logarithm.
        fn between(&mut self, low: f32, high: f32) -> f32 {
            low * (high / low).powf(self.next())
        }

        fn terminal(&mut self) -> Terminal {
            let kinetics = Kinetics {
                tau_c: self.between(1.0, 4096.0),
                tau_rrp: self.between(1.0, 4096.0),
                alpha_ca: self.between(0.001, 2.0),
                k_fast: self.between(0.02, 20.0),
                k_slow: self.between(0.02, 20.0),
                syt_mix: self.next(),
                syt_gain: self.between(0.05, 12.0),
                release_bias: 9.0 * self.next() - 6.0,
                release_rate: self.between(0.0005, 1.0),
                gain_release: 8.0 * self.next() - 4.0,
                gain_depletion: 8.0 * self.next() - 4.0,
            };
            let tick = [1, 4, 8, 16, 64, 1024][(self.next() * 6.0) as usize];
            Terminal::new(kinetics, tick, 8.0 * self.next().round(), self.between(1e-6, 0.1))
        }

        /// A drive that an attacker or an accident may make.
        fn drive(&mut self) -> f32 {
            match (self.next() * 5.0) as usize {
                0 => 0.0,
                1 => 1e4,
                2 => self.between(1e-20, 1e8),
                _ => 3.0 * self.next(),
            }
        }
    }

    #[test]
    fn random_streams_keep_the_invariants() {
        let mut random = Random(1);
        for _ in 0..300 {
            let terminal = random.terminal();
            let keys = 1 + (random.next() * 40.0) as usize;
            let (mut calcium, mut vesicles, mut beta) = (vec![0.0; keys], vec![1.0; keys], vec![f32::NAN; keys]);
            for _ in 0..60 {
                let drive: Vec<f32> = (0..keys).map(|_| random.drive()).collect();
                tick(&terminal, &mut calcium, &mut vesicles, Some(&drive), Some(&mut beta));
                assert!(calcium.iter().all(|c| c.is_finite() && *c >= 0.0), "calcium of {terminal:?}");
                assert!(vesicles.iter().all(|r| (0.0..=1.0).contains(r)), "pools of {terminal:?}: {vesicles:?}");
                let limit = if terminal.beta_max > 0.0 { terminal.beta_max } else { f32::MAX };
                assert!(beta.iter().all(|b| b.abs() <= limit), "bias of {terminal:?}");
            }
        }
    }

    #[test]
    fn a_rested_terminal_has_no_bias_and_stays_at_rest() {
        let mut random = Random(2);
        for _ in 0..100 {
            let terminal = random.terminal();
            let (mut calcium, mut vesicles, mut beta) = (vec![0.0; 19], vec![1.0; 19], vec![f32::NAN; 19]);
            tick(&terminal, &mut calcium, &mut vesicles, Some(&[0.0; 19]), Some(&mut beta));
            assert_eq!((calcium, vesicles, beta), (vec![0.0; 19], vec![1.0; 19], vec![0.0; 19]));
        }
    }

    #[test]
    fn any_cut_of_the_ticks_leads_to_the_same_state() {
        let mut random = Random(3);
        let (terminals, keys, ticks) = ([random.terminal(), random.terminal()], 21, 6);
        let drive: Vec<f32> = (0..2 * ticks * keys).map(|_| random.drive()).collect();
        let size = 2 * keys;
        let go = |threads: usize, pieces: &[usize]| {
            let (mut calcium, mut vesicles, mut open_drive) = (vec![0.0; size], vec![1.0; size], vec![0.0; size]);
            let mut first = 0;
            for &n in pieces {
                let part: Vec<f32> =
                    drive.chunks_exact(ticks * keys).flat_map(|head| &head[first * keys..(first + n) * keys]).copied().collect();
                let states = States { calcium: &mut calcium, vesicles: &mut vesicles, open_drive: &mut open_drive };
                run(&terminals, &part, &mut vec![0.0; part.len()], states, &Course { keys, closed: &[n], young: false }, threads);
                first += n;
            }
            (calcium, vesicles)
        };
        assert_eq!(go(1, &[6]), go(2, &[1, 2, 3]));
    }
}
