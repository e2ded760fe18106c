//! A chunk of many new tokens where there are too few heads for all threads: one head at a time, on all of them.
//!
//! Terminals know nothing of each other, so that a panel of keys can pass through many ticks alone: it leaves the logits of all their
//! queries, bias included. Then every block of queries is mixed alone. The numbers are those of `prefill`, to the bit.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::layer::Barrier;
use crate::parallel::{Shared, in_phases};
use crate::prefill::{Course, Head, Scores};
use crate::presyn::Collect;
use crate::simd::fastest;
use crate::tile::{LANES, ROWS};

/// Keys of a panel, and about how many queries pass through the panels before they are mixed.
const PANEL: usize = 128;
const SLAB: usize = 128;
/// Blocks that one item of work mixes, in the same memory.
const BLOCKS: usize = 4;

/// Whether `items` heads would leave a good part of the threads idle.
pub(crate) fn pays(items: usize, threads: usize) -> bool {
    let rounds = items.div_ceil(threads.max(1));
    threads > 1 && 4 * items < 3 * rounds * threads
}

/// Blocks of queries and the row of a panel at which the logits of each begin.
struct Slab {
    blocks: Vec<(Range<usize>, usize)>,
    rows: usize,
}

fn slabs(blocks: impl Iterator<Item = Range<usize>>) -> Vec<Slab> {
    let mut found: Vec<Slab> = Vec::new();
    for block in blocks {
        let full = |slab: &Slab| block.end - slab.blocks[0].0.start > SLAB;
        if found.last().is_none_or(full) {
            found.push(Slab { blocks: Vec::new(), rows: 0 });
        }
        if let Some(slab) = found.last_mut() {
            let rows = block.len().next_multiple_of(ROWS);
            slab.blocks.push((block, slab.rows));
            slab.rows += rows;
        }
    }
    found
}

/// Read the chunk of one head; `whole` and y `[t, D]` change. Returns whether all logits were finite.
pub(crate) fn walk(whole: Course, work: &Head, y: &mut [f32], threads: usize) -> bool {
    let Course { site, head, level, calcium, vesicles, open, beta, .. } = whole;
    let (alive, reach) = (!site.terminals.is_empty(), work.reach);
    let length = reach.start + reach.count;
    let states = [calcium, vesicles, open, beta].map(Shared::new);
    let (finite, y) = (AtomicBool::new(true), Shared::new(y));
    let all = slabs(reach.blocks());
    let panels = |slab: &Slab| slab.blocks.last().map_or(0, |(block, _)| (reach.start + block.end).div_ceil(PANEL));
    let size = |slab: &Slab| panels(slab) * slab.rows * PANEL;
    // one slab after the other uses it: what an earlier one left is written over or in nobody's sight
    let mut logits = vec![0.0; all.iter().map(size).max().unwrap_or(0)];
    let logits = Shared::new(&mut logits);
    let phases: Vec<usize> = all.iter().flat_map(|slab| [panels(slab), slab.blocks.len().div_ceil(BLOCKS)]).collect();
    in_phases(threads, &phases, |phase, item| {
        let slab = &all[phase / 2];
        if phase % 2 == 0 {
            let (begin, end) = (item * PANEL, length.min((item + 1) * PANEL));
            let own = if alive { begin..end } else { 0..0 };
            // SAFETY: each item of a phase has a panel of keys for itself.
            let [calcium, vesicles, open, beta] = unsafe { states.map(|state| state.part(own.clone())) };
            // SAFETY: as above.
            let logits = unsafe { logits.part(item * slab.rows * PANEL..(item + 1) * slab.rows * PANEL) };
            let mut course = Course { site, head, level, offset: begin, calcium, vesicles, open, beta };
            pass(&mut course, work, slab, end, logits);
            return;
        }
        // SAFETY: in this phase logits are read alone.
        let logits = unsafe { logits.read(0..size(slab)) };
        let mut scores = Scores::default();
        for (block, row) in slab.blocks.iter().skip(item * BLOCKS).take(BLOCKS) {
            scores.cover(&reach, block);
            gather(&mut scores, logits, slab.rows, *row, block.len());
            // SAFETY: each item has queries of its own.
            let y = unsafe { y.part(block.start * work.dim..block.end * work.dim) };
            if !work.mix(block, &mut scores, None, y) {
                finite.store(false, Ordering::Relaxed);
            }
        }
    });
    finite.into_inner()
}

/// Take one panel of keys, up to `end`, through the ticks of a slab. logits: `[rows, PANEL]`.
fn pass(course: &mut Course, work: &Head, slab: &Slab, end: usize, logits: &mut [f32]) {
    let (site, reach, begin) = (course.site, work.reach, course.offset);
    let alive = !site.terminals.is_empty();
    let (mut bias, mut tick) = ([0.0f32; PANEL], usize::MAX);
    for (block, row) in &slab.blocks {
        let position = reach.start + block.start;
        let first = reach.low(position) / LANES * LANES;
        let stop = (reach.start + block.end).next_multiple_of(LANES);
        let keys = begin.max(first)..stop.min(begin + PANEL);
        let rows = &mut logits[row * PANEL..];
        if !keys.is_empty() {
            work.products(block, keys, &mut rows[first.saturating_sub(begin)..], PANEL);
        }
        if tick != position / site.tick && (alive || site.barrier != Barrier::None) {
            tick = position / site.tick;
            course.bias_of(tick * site.tick, &mut bias[..end - begin]);
        }
        for (i, query) in block.clone().enumerate() {
            let position = reach.start + query;
            let row = &mut rows[i * PANEL..(i + 1) * PANEL];
            let (low, high) = (reach.low(position).max(begin), position.min(end));
            if alive && low < high {
                let (theta, share) = (site.theta[course.head], 1.0 / site.tick as f32);
                let (logits, sum) = (&row[low - begin..high - begin], &mut course.open[low - begin..high - begin]);
                if site.soft {
                    fastest(Collect::<true> { logits, sum, theta, share });
                } else {
                    fastest(Collect::<false> { logits, sum, theta, share });
                }
            }
            row.iter_mut().zip(&bias).for_each(|(x, b)| *x += b);
        }
        let stop = reach.start + block.end;
        if alive && stop % site.tick == 0 && stop > begin {
            course.end_tick((stop - begin).min(end - begin));
        }
    }
}

/// Rows of a block from all panels side by side.
fn gather(scores: &mut Scores, logits: &[f32], rows: usize, row: usize, count: usize) {
    let (first, width) = (scores.first, scores.width);
    for (i, into) in scores.logits.chunks_exact_mut(width).take(count).enumerate() {
        let mut key = first;
        while key < first + width {
            let (panel, stop) = (key / PANEL, (first + width).min((key / PANEL + 1) * PANEL));
            let from = (panel * rows + row + i) * PANEL + key % PANEL;
            // the last tile may reach beyond the last panel: those keys come later than any query
            let part = &logits[from.min(logits.len())..(from + stop - key).min(logits.len())];
            into[key - first..][..part.len()].copy_from_slice(part);
            key = stop;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{Arrival, Cache, Running, Site};
    use crate::prefill::chunk;
    use crate::presyn::{Kinetics, Terminal};

    fn site(barrier: Barrier, window: usize, tick: usize, alive: bool) -> Site {
        let kinetics = Kinetics {
            tau_c: 12.0,
            tau_rrp: 24.0,
            alpha_ca: 0.5,
            k_fast: 0.4,
            k_slow: 3.0,
            syt_mix: 0.7,
            syt_gain: 3.0,
            release_bias: -1.0,
            release_rate: 0.2,
            gain_release: 0.8,
            gain_depletion: -0.6,
        };
        let terminals = if alive { vec![Terminal::new(kinetics, tick, 8.0, 1e-4)] } else { vec![] };
        let (theta, strength) = (vec![-0.5; terminals.len()], vec![0.3; usize::from(barrier != Barrier::None)]);
        let (heads, kv_heads, dim, scale, soft) = (1, 1, 8, 0.3, false);
        Site { heads, kv_heads, dim, tick, scale, window, soft, theta, terminals, barrier, strength }
    }

    #[test]
    fn one_head_on_several_threads_is_one_head_to_the_bit() {
        let (length, dim, number) = (420, 8, |i: usize| ((i * 7919 % 199) as f32 - 99.0) / 60.0);
        let k: Vec<f32> = (0..length * dim).map(number).collect();
        let v: Vec<f32> = (0..length * dim).map(|i| number(i + 5)).collect();
        for (barrier, window, tick, alive) in [
            (Barrier::Gated, usize::MAX, 8, true),
            (Barrier::Linear, 40, 4, true),
            (Barrier::None, 150, 1, true),
            (Barrier::Gated, 33, 64, false),
            (Barrier::None, usize::MAX, 8, false),
        ] {
            let site = site(barrier, window, tick, alive);
            let go = |threads| {
                let n = if alive { length } else { 0 };
                let (mut calcium, mut vesicles, mut open_drive, mut beta) = (vec![0.0; n], vec![1.0; n], vec![0.0; n], vec![0.0; n]);
                let gated = barrier == Barrier::Gated;
                let (mut level, mut all) = (vec![0.0; if gated { length } else { 0 }], Vec::new());
                for (start, count) in [(0, 131), (131, 2), (133, 283)] {
                    let q: Vec<f32> = (0..count * dim).map(|i| number(i + 3 * start + 1)).collect();
                    let gate: Vec<f32> = (0..if gated { count } else { 0 }).map(|i| 2.0 + number(i)).collect();
                    let mut y = vec![f32::NAN; count * dim];
                    let running = Running {
                        calcium: &mut calcium,
                        vesicles: &mut vesicles,
                        open_drive: &mut open_drive,
                        beta: &mut beta,
                        level: &mut level,
                    };
                    let new = Arrival { q: &q, y: &mut y, gate: &gate, starts: &[start], counts: &[count], size: count };
                    assert!(chunk(&site, &Cache { k: &k, v: &v, length }, running, new, threads).unwrap());
                    all.extend(y);
                }
                [all, calcium, vesicles, open_drive, beta].concat()
            };
            let alone = go(1);
            assert!(alone.iter().all(|x| x.is_finite()));
            assert_eq!(alone, go(3), "{barrier:?} {window} {tick} {alive}");
        }
    }

    #[test]
    fn it_pays_where_threads_would_be_idle() {
        assert!(pays(1, 2) && pays(1, 8) && pays(5, 8) && pays(9, 8));
        assert!(!pays(1, 1) && !pays(2, 2) && !pays(3, 2) && !pays(12, 2) && !pays(7, 8) && !pays(100, 8));
    }
}
