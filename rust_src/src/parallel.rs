//! Independent items of work on several threads, of which the caller is one.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

type Pools = HashMap<(u32, usize), Option<Arc<ThreadPool>>>;

/// Pools by process and size: threads do not follow a process into its fork.
static POOLS: Mutex<Option<Pools>> = Mutex::new(None);

fn helpers(count: usize) -> Option<Arc<ThreadPool>> {
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let made = || ThreadPoolBuilder::new().num_threads(count).build().ok().map(Arc::new);
    pools.get_or_insert_default().entry((std::process::id(), count)).or_insert_with(made).clone()
}

/// Call `work` for every item in 0..items, on up to `threads` threads. A panic in an item is passed on.
pub fn for_each(threads: usize, items: usize, work: impl Fn(usize) + Sync) {
    let threads = threads.min(items);
    let next = AtomicUsize::new(0);
    let take_turns = || {
        loop {
            let item = next.fetch_add(1, Ordering::Relaxed);
            if item >= items {
                break;
            }
            work(item);
        }
    };
    match if threads > 1 { helpers(threads - 1) } else { None } {
        None => take_turns(),
        Some(pool) => pool.in_place_scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|_| take_turns());
            }
            take_turns();
        }),
    }
}

/// Call `work(phase, item)` for every item of every phase, in order of phases: an item begins when all phases before its own are done.
///
/// One scope serves all phases, so that a thread that wakes up late joins in the middle and is not waited for.
pub fn in_phases(threads: usize, sizes: &[usize], work: impl Fn(usize, usize) + Sync) {
    /// Counts an item as done, also when it panics, for nobody else would.
    struct Done<'a>(&'a AtomicUsize);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Release);
        }
    }
    let starts: Vec<usize> = sizes.iter().scan(0, |sum, size| Some(std::mem::replace(sum, *sum + size))).collect();
    let (total, done) = (sizes.iter().sum(), AtomicUsize::new(0));
    for_each(threads, total, |ticket| {
        let _done = Done(&done);
        let phase = starts.partition_point(|&start| start <= ticket) - 1;
        let mut patience = 0;
        while done.load(Ordering::Acquire) < starts[phase] {
            patience += 1;
            if patience < 200 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        work(phase, ticket - starts[phase]);
    });
}

/// A slice of which items of work on several threads change parts that do not overlap.
#[derive(Clone, Copy)]
pub struct Shared<'a, T> {
    data: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out parts as `&mut [T]`, which may be sent where T may.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above; `part` makes its caller promise that parts do not overlap.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Take over a slice.
    pub fn new(slice: &'a mut [T]) -> Self {
        Shared { data: slice.as_mut_ptr(), len: slice.len(), lifetime: PhantomData }
    }

    /// One part to read. Panics when it is out of bounds.
    ///
    /// # Safety
    /// Nothing that overlaps is changed while it lives.
    #[inline(always)]
    pub unsafe fn read(&self, range: Range<usize>) -> &'a [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part {range:?} of {}", self.len);
        // SAFETY: inside of the slice by the check above, and not changed by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.data.add(range.start), range.len()) }
    }

    /// One part. Panics when it is out of bounds.
    ///
    /// # Safety
    /// No two parts that live at the same time overlap.
    #[inline(always)]
    pub unsafe fn part(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part {range:?} of {}", self.len);
        // SAFETY: inside of the slice by the check above, and not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_done_once_whatever_the_number_of_threads() {
        for threads in [0, 1, 2, 5] {
            let mut done = vec![0u8; 37];
            let shared = Shared::new(&mut done);
            for_each(threads, 37, |i| {
                // SAFETY: each item touches its own element.
                let own = unsafe { shared.part(i..i + 1) };
                own[0] += 1;
            });
            assert!(done.iter().all(|&n| n == 1));
        }
    }

    #[test]
    fn an_item_sees_all_of_the_phases_before_its_own() {
        for threads in [1, 2, 5] {
            let done = AtomicUsize::new(0);
            in_phases(threads, &[3, 0, 7, 1, 40], |phase, item| {
                let before = [0, 3, 3, 10, 11][phase];
                let seen = done.load(Ordering::Relaxed);
                assert!(seen >= before && item < [3, 0, 7, 1, 40][phase]);
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 51);
        }
        assert!(std::panic::catch_unwind(|| in_phases(3, &[4, 4], |phase, item| assert!(phase + item > 0))).is_err());
    }

    #[test]
    fn a_panic_in_an_item_reaches_the_caller_and_leaves_the_pool_working() {
        let caught = std::panic::catch_unwind(|| for_each(2, 8, |i| assert_ne!(i, 5)));
        assert!(caught.is_err());
        for_each(2, 8, |_| ());
    }
}
