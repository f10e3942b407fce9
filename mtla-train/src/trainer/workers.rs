//! Threads for the batches of a step.

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

/// Some pools of threads among which the cores are divided: what runs on one of them spreads its work over that
/// one alone, and none waits for another's.
pub(super) struct Workers(Vec<ThreadPool>);

impl Workers {
    /// `n` of them. One alone takes the cores as they are.
    pub(super) fn new(n: usize) -> Result<Self, ThreadPoolBuildError> {
        let threads = (rayon::current_num_threads() / n.max(1)).max(1);
        let pools = if n < 2 { 0 } else { n };
        (0..pools)
            .map(|worker| {
                ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .thread_name(move |thread| format!("worker {worker}.{thread}"))
                    .build()
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    pub(super) fn count(&self) -> usize {
        self.0.len().max(1)
    }

    /// The results of `work` for each item, at most as many as there are workers, each on its own.
    ///
    /// # Panics
    /// If there are more items than workers, or one of them panics.
    pub(super) fn map<T: Send, R: Send>(
        &self,
        items: Vec<T>,
        work: impl Fn(T) -> R + Sync,
    ) -> Vec<R> {
        assert!(items.len() <= self.count(), "as many items as workers");
        if items.len() < 2 {
            return items.into_iter().map(work).collect();
        }
        let work = &work;
        std::thread::scope(|scope| {
            let threads: Vec<_> = items
                .into_iter()
                .zip(&self.0)
                .map(|(item, pool)| scope.spawn(move || pool.install(|| work(item))))
                .collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
                .collect()
        })
    }
}
