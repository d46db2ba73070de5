//! Fixed worker threads that run one parallel region after the other, and buffers cut into parts for them.
//!
//! A region is "every worker runs its own share, then one barrier". Between the regions of a forward pass the workers
//! spin, since the next one comes within microseconds; after [`SPIN`] without work they park and use no CPU.

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long an idle worker spins before it parks: longer than what happens between two tokens.
const SPIN: Duration = Duration::from_micros(200);

/// A region's work, seen by all workers; the lifetime is erased and restored by `Pool::region`, which outlasts it.
type Region = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Counts the regions: a worker that sees a new value runs `region` once.
    epoch: AtomicUsize,
    region: UnsafeCell<Option<Region>>,
    /// Workers that have not finished the current region.
    running: AtomicUsize,
    stop: AtomicBool,
    parked: Vec<AtomicBool>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `region` is written only by the thread that owns the pool, while no worker runs (`running` is zero), and is
// published by the release store to `epoch` that workers acquire. What it points to is Sync.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is never used after the region that it belongs to.
unsafe impl Send for Shared {}

/// Workers and the thread that calls them: `n_threads` in all.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<(Thread, Option<JoinHandle<()>>)>,
}

impl Pool {
    /// A pool of `n_threads` (at least 1), of which the caller is one.
    ///
    /// # Errors
    /// What the operating system says when it gives no more threads.
    pub fn new(n_threads: usize) -> std::io::Result<Pool> {
        let n_workers = n_threads.max(1) - 1;
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            region: UnsafeCell::new(None),
            running: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            parked: (0..n_workers).map(|_| AtomicBool::new(false)).collect(),
            panic: Mutex::new(None),
        });
        let mut pool = Pool { shared, workers: Vec::with_capacity(n_workers) };
        for index in 0..n_workers {
            let shared = Arc::clone(&pool.shared);
            let handle = thread::Builder::new()
                .name(format!("gpt2rs-{}", index + 1))
                .spawn(move || work(&shared, index))?;
            pool.workers.push((handle.thread().clone(), Some(handle)));
        }
        Ok(pool)
    }

    /// Threads that run a region, the caller's included.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `work(part)` for each of `parts` (at most one a thread), in parallel, and waits for all.
    ///
    /// # Panics
    /// When `work` panics in any thread, after all of them have ended.
    pub fn run<P: Send>(&mut self, parts: Vec<P>, work: impl Fn(P) + Sync) {
        assert!(parts.len() <= self.n_threads(), "{} parts for {} threads", parts.len(), self.n_threads());
        if parts.len() == 1 {
            return parts.into_iter().for_each(work);
        }
        let slots: Vec<Mutex<Option<P>>> = parts.into_iter().map(|part| Mutex::new(Some(part))).collect();
        self.region(&|thread| {
            let part =
                slots.get(thread).and_then(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner).take());
            if let Some(part) = part {
                work(part);
            }
        });
    }

    fn region(&mut self, work: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; the pointer is used by workers until `running` is zero, and this function
        // waits for that before it returns, also when its own share panics.
        let region: Region = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Region>(work) };
        // SAFETY: `&mut self` means that no other region runs, so no worker reads the cell now.
        unsafe { *shared.region.get() = Some(region) };
        shared.running.store(self.workers.len(), Ordering::Relaxed);
        // Sequentially consistent, as are the worker's store to `parked` and its last look at `epoch`: one of the two
        // threads sees the other's store, so no worker sleeps through a region.
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for ((thread, _), parked) in self.workers.iter().zip(&shared.parked) {
            if parked.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| work(0)));
        let mut spins = 0u32;
        while shared.running.load(Ordering::Acquire) != 0 {
            spins = spins.saturating_add(1);
            // A worker that is late by more than any imbalance may be waiting for this very core.
            if spins > 4096 { thread::yield_now() } else { std::hint::spin_loop() }
        }
        let theirs = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (thread, handle) in &mut self.workers {
            thread.unpark();
            if let Some(handle) = handle.take() {
                let _ = handle.join();
            }
        }
    }
}

fn work(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        seen = wait(shared, index, seen);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        // SAFETY: the new epoch was acquired, so the cell was written before and is not written again until this
        // worker has lowered `running`; the pointer is valid until then.
        let region = unsafe { (*shared.region.get()).map(|region| &*region) };
        if let Some(region) = region
            && let Err(panic) = catch_unwind(AssertUnwindSafe(|| region(index + 1)))
        {
            *shared.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        shared.running.fetch_sub(1, Ordering::Release);
    }
}

/// Waits until the epoch is no longer `seen` and returns the new one.
fn wait(shared: &Shared, index: usize, seen: usize) -> usize {
    let idle_since = Instant::now();
    loop {
        for _ in 0..256 {
            let epoch = shared.epoch.load(Ordering::Acquire);
            if epoch != seen {
                return epoch;
            }
            std::hint::spin_loop();
        }
        if idle_since.elapsed() >= SPIN {
            break;
        }
        // With more threads than cores, another may be waiting for this one.
        thread::yield_now();
    }
    loop {
        shared.parked[index].store(true, Ordering::SeqCst);
        let epoch = shared.epoch.load(Ordering::SeqCst);
        if epoch != seen {
            shared.parked[index].store(false, Ordering::SeqCst);
            return epoch;
        }
        thread::park();
        shared.parked[index].store(false, Ordering::SeqCst);
    }
}

/// `0..n` in `parts` consecutive ranges whose lengths differ by one at most; the i-th of them.
pub fn share(n: usize, parts: usize, i: usize) -> Range<usize> {
    n * i / parts..n * (i + 1) / parts
}

/// One thread's columns of a row-major matrix, to be written while other threads write theirs.
pub struct Columns<'a> {
    data: *mut f32,
    stride: usize,
    rows: usize,
    columns: Range<usize>,
    matrix: PhantomData<&'a mut [f32]>,
}

// SAFETY: the columns of one value are written through it alone (see `Columns::split`), and f32 is Send.
unsafe impl Send for Columns<'_> {}

impl<'a> Columns<'a> {
    /// Cuts a matrix of `rows` rows, `stride` apart, at the given column ranges.
    ///
    /// # Panics
    /// Unless the ranges ascend without overlapping inside `stride`, and `data` holds all rows.
    pub fn split(
        data: &'a mut [f32],
        stride: usize,
        rows: usize,
        ranges: impl IntoIterator<Item = Range<usize>>,
    ) -> Vec<Columns<'a>> {
        let mut end = 0;
        let base = data.as_mut_ptr();
        let parts: Vec<_> = ranges
            .into_iter()
            .map(|columns| {
                assert!(end <= columns.start && columns.start <= columns.end && columns.end <= stride);
                end = columns.end;
                Columns { data: base, stride, rows, columns, matrix: PhantomData }
            })
            .collect();
        assert!(rows == 0 || (rows - 1) * stride + end <= data.len());
        parts
    }

    /// A part of these, as a matrix of its own whose first row and column are 0.
    ///
    /// # Panics
    /// When the rows, or the columns (counted from the first of these), lie outside.
    pub fn part(&mut self, rows: Range<usize>, columns: Range<usize>) -> Columns<'_> {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        assert!(columns.start <= columns.end && columns.end <= self.columns.len());
        let offset = rows.start * self.stride + self.columns.start + columns.start;
        // An empty part may begin behind the data; it is never read.
        let data = self.data.wrapping_add(offset);
        Columns {
            data,
            stride: self.stride,
            rows: rows.len(),
            columns: 0..columns.len(),
            matrix: PhantomData,
        }
    }

    /// Distance between rows.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Which columns of the matrix these are.
    pub fn range(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// These columns of row `row`.
    #[inline(always)]
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows);
        // SAFETY: `split` checked that every row of these columns lies inside the data, which is mutably borrowed for
        // 'a, and that no other value has these columns; `part` narrows that while it borrows the whole. `&mut self`
        // keeps it to one slice at a time.
        unsafe {
            let start = self.data.add(row * self.stride + self.columns.start);
            std::slice::from_raw_parts_mut(start, self.columns.len())
        }
    }
}

/// A value behind a lock that a forked child makes anew: threads do not survive `fork`, and a lock held by another
/// thread at that moment would stay locked for ever.
pub struct PerProcess<T> {
    current: AtomicPtr<Owned<T>>,
    make: Box<dyn Fn() -> T + Send + Sync>,
}

struct Owned<T> {
    process: u32,
    value: Mutex<T>,
}

// SAFETY: the pointer is to a leaked box that is replaced, never freed, while `&self` lives; T is Send behind a lock.
unsafe impl<T: Send> Sync for PerProcess<T> {}

impl<T> PerProcess<T> {
    /// `first` for this process, and `make` for its children.
    pub fn new(first: T, make: impl Fn() -> T + Send + Sync + 'static) -> PerProcess<T> {
        let first = Owned::leak(first);
        PerProcess { current: AtomicPtr::new(first), make: Box::new(make) }
    }

    /// This process's value, locked.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let process = std::process::id();
        let mut current = self.current.load(Ordering::Acquire);
        // SAFETY: never null, and what it points to is not freed before `self` is dropped.
        while unsafe { (*current).process } != process {
            let fresh = Owned::leak((self.make)());
            match self.current.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => current = fresh,
                Err(other) => {
                    // SAFETY: `fresh` was made just above and nobody else has seen it.
                    drop(unsafe { Box::from_raw(fresh) });
                    current = other;
                }
            }
        }
        // SAFETY: as above. The parent's value stays leaked in the child, where its threads do not exist.
        let owned = unsafe { &*current };
        owned.value.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Owned<T> {
    fn leak(value: T) -> *mut Owned<T> {
        Box::into_raw(Box::new(Owned { process: std::process::id(), value: Mutex::new(value) }))
    }
}

impl<T> Drop for PerProcess<T> {
    fn drop(&mut self) {
        let current = *self.current.get_mut();
        // SAFETY: never null; `&mut self` means that nobody else uses it.
        if unsafe { (*current).process } == std::process::id() {
            // SAFETY: made by `leak`, and dropped only here. A parent's value in a child is left alone: dropping it
            // would wait for threads that do not exist.
            drop(unsafe { Box::from_raw(current) });
        }
    }
}

/// Threads that help a model whose weights are `bytes` large, on this machine: the CPUs that this process may use
/// (affinity and cgroup quota), physical cores only, and one for each [`BYTES_PER_THREAD`].
pub fn default_threads(bytes: usize) -> usize {
    /// Below this share of the weights, a thread waits at barriers longer than it reads.
    const BYTES_PER_THREAD: usize = 2 << 20;
    let usable = thread::available_parallelism().map_or(1, usize::from);
    usable.min(num_cpus::get_physical()).min(bytes / BYTES_PER_THREAD).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn every_part_runs_once_on_any_number_of_threads() {
        for n_threads in [1, 2, 3, 5] {
            let mut pool = Pool::new(n_threads).unwrap();
            let sum = AtomicU64::new(0);
            for region in 0..2000u64 {
                let parts: Vec<u64> = (0..n_threads as u64).map(|i| region * 10 + i).collect();
                let expected: u64 = parts.iter().sum();
                sum.store(0, Ordering::Relaxed);
                pool.run(parts, |part| {
                    sum.fetch_add(part, Ordering::Relaxed);
                });
                assert_eq!(sum.load(Ordering::Relaxed), expected);
            }
        }
    }

    #[test]
    fn workers_that_parked_come_back() {
        let mut pool = Pool::new(3).unwrap();
        for _ in 0..5 {
            let count = AtomicU64::new(0);
            pool.run(vec![1, 2, 3], |part| {
                count.fetch_add(part, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 6);
            let idle_since = Instant::now();
            while !pool.shared.parked.iter().all(|parked| parked.load(Ordering::SeqCst)) {
                assert!(idle_since.elapsed() < Duration::from_secs(20), "idle workers must park");
                thread::sleep(SPIN);
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let mut pool = Pool::new(3).unwrap();
        for culprit in 0..3 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(vec![0, 1, 2], |part| assert_ne!(part, culprit));
            }));
            assert!(outcome.is_err());
            pool.run(vec![0, 1, 2], |_| ());
        }
    }

    #[test]
    fn shares_cover_everything_once() {
        for n in 0..40 {
            for parts in 1..9 {
                let all: Vec<usize> = (0..parts).flat_map(|i| share(n, parts, i)).collect();
                assert_eq!(all, (0..n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn columns_are_disjoint_and_inside() {
        let mut data = vec![0.0; 3 * 8];
        for (i, mut part) in Columns::split(&mut data, 8, 3, [0..3, 3..4, 6..8]).into_iter().enumerate() {
            for row in 0..3 {
                part.row(row).fill((i + 1) as f32);
            }
        }
        assert_eq!(data[8..16], [1.0, 1.0, 1.0, 2.0, 0.0, 0.0, 3.0, 3.0]);
        let mut columns = Columns::split(&mut data, 8, 3, [1..7]).pop().unwrap();
        assert_eq!(columns.part(1..2, 2..6).row(0), [2.0, 0.0, 0.0, 3.0]);
        assert!(catch_unwind(AssertUnwindSafe(|| columns.part(1..4, 0..1).range())).is_err());
        assert!(catch_unwind(AssertUnwindSafe(|| columns.part(0..1, 3..7).range())).is_err());
        assert!(catch_unwind(|| Columns::split(&mut [0.0; 8], 8, 1, [0..5, 4..8]).len()).is_err());
        assert!(catch_unwind(|| Columns::split(&mut [0.0; 8], 8, 2, [0..4, 4..8]).len()).is_err());
    }
}
