//! Work on all cores. Which task does what never depends on how many there are, so neither do results.

/// Calls `work` with `0..tasks`, on all cores if there are enough multiplications to be worth it.
pub(super) fn for_each(tasks: usize, multiplications: usize, work: impl Fn(usize) + Sync + Send) {
    /// Below this the cores would mostly wait for each other.
    const WORTH_IT: usize = 1 << 17;
    #[cfg(not(target_family = "wasm"))]
    if tasks > 1 && multiplications > WORTH_IT {
        use rayon::prelude::*;
        (0..tasks).into_par_iter().with_max_len(1).for_each(work);
        return;
    }
    let _ = (multiplications, WORTH_IT);
    (0..tasks).for_each(work);
}

/// Calls `work` with each item, on all cores if there are `elements` enough to be worth it.
pub(super) fn for_each_mut<T: Send>(
    items: &mut [T],
    elements: usize,
    work: impl Fn(&mut T) + Sync + Send,
) {
    const WORTH_IT: usize = 1 << 15;
    #[cfg(not(target_family = "wasm"))]
    if items.len() > 1 && elements > WORTH_IT {
        use rayon::prelude::*;
        // Neighbours stay together: an item may be small.
        let least = items.len().div_ceil(elements / 4096);
        items.par_iter_mut().with_min_len(least).for_each(work);
        return;
    }
    let _ = (elements, WORTH_IT);
    items.iter_mut().for_each(work);
}

/// The cores for one large product.
pub(super) fn parallelism(multiplications: usize) -> gemm::Parallelism {
    const WORTH_IT: usize = 1 << 22;
    #[cfg(not(target_family = "wasm"))]
    if multiplications > WORTH_IT {
        return gemm::Parallelism::Rayon(0);
    }
    let _ = (multiplications, WORTH_IT);
    gemm::Parallelism::None
}
