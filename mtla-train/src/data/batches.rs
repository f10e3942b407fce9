//! The order in which a data set is seen.
//!
//! An epoch is a plan: the lists of items that make its batches, computed from a seed. To go on in
//! the middle of an epoch, the plan is made again and its first batches are left out; no item of
//! them is read. The reading and batching itself is Burn's [`BatchDataLoader`].

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{BatchDataLoader, BatchStrategy};
use burn::data::dataset::{Dataset, transform::SelectionDataset};
use burn::tensor::backend::Backend;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::VecDeque;
use std::sync::Arc;

/// The batches of an epoch, each a list of indices into the data set.
pub type Plan = Vec<Vec<usize>>;

/// A data set with the order and the batches in which it is seen.
///
/// ```
/// use burn_flex::Flex;
/// use mtla_train::data::{Batches, Packing, TextBatcher, TokenBlocks};
///
/// let story = [5, 6, 7, 8, 9, 10, 0];
/// let blocks = TokenBlocks::new([story], 2, Packing::Stream)?;
/// let batches = Batches::<Flex, _, _>::shuffled(blocks, TextBatcher, 2);
/// assert_eq!(batches.len(), 2); // three blocks: a batch of two, and one of one
/// # Ok::<(), mtla_train::data::BlockError>(())
/// ```
pub struct Batches<B: Backend, I, O> {
    dataset: Arc<dyn Dataset<I>>,
    batcher: Arc<dyn Batcher<B, I, O>>,
    plan: Box<dyn Fn(u64) -> Plan + Send + Sync>,
    len: usize,
}

impl<B, I, O> Batches<B, I, O>
where
    B: Backend,
    I: Clone + Send + Sync + 'static,
    O: Send + 'static,
{
    /// The items in their own order, `size` at a time, the same in every epoch: for validation.
    ///
    /// # Panics
    ///
    /// If `size` is 0, here and in the other constructors.
    pub fn sequential(
        dataset: impl Dataset<I> + 'static,
        batcher: impl Batcher<B, I, O> + 'static,
        size: usize,
    ) -> Self {
        let items: Vec<usize> = (0..dataset.len()).collect();
        Self::planned(dataset, batcher, move |_| chunks(&items, size))
    }

    /// The items in another random order in each epoch, `size` at a time.
    pub fn shuffled(
        dataset: impl Dataset<I> + 'static,
        batcher: impl Batcher<B, I, O> + 'static,
        size: usize,
    ) -> Self {
        let len = dataset.len();
        Self::planned(dataset, batcher, move |seed| {
            chunks(&shuffle(len, &mut rng(seed)), size)
        })
    }

    /// Items of similar length together, `size` at a time, the batches in random order: there is
    /// little padding. `lengths` has the length of each item.
    ///
    /// # Panics
    ///
    /// If there is not one length for each item.
    pub fn bucketed(
        dataset: impl Dataset<I> + 'static,
        batcher: impl Batcher<B, I, O> + 'static,
        size: usize,
        lengths: Vec<usize>,
    ) -> Self {
        assert_eq!(lengths.len(), dataset.len(), "one length for each item");
        Self::planned(dataset, batcher, move |seed| {
            let mut rng = rng(seed);
            let mut items = shuffle(lengths.len(), &mut rng);
            items.sort_by_key(|&item| lengths[item]);
            let mut batches = chunks(&items, size);
            batches.shuffle(&mut rng);
            batches
        })
    }

    /// Batches as `plan` makes them from the epoch's seed, and from nothing else. Plans should have
    /// the same number of batches for every seed: the length of a run is reckoned with it.
    pub fn planned(
        dataset: impl Dataset<I> + 'static,
        batcher: impl Batcher<B, I, O> + 'static,
        plan: impl Fn(u64) -> Plan + Send + Sync + 'static,
    ) -> Self {
        let len = plan(0).len();
        Self {
            dataset: Arc::new(dataset),
            batcher: Arc::new(batcher),
            plan: Box::new(plan),
            len,
        }
    }

    /// Batches in an epoch.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether an epoch is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The epoch that `seed` gives, from its batch `skip` on.
    ///
    /// # Panics
    ///
    /// If the plan names an item that the data set does not have.
    pub fn epoch(&self, seed: u64, skip: usize, device: &B::Device) -> BatchDataLoader<B, I, O> {
        let mut plan = (self.plan)(seed);
        plan.drain(..skip.min(plan.len()));
        let sizes = plan.iter().map(Vec::len).collect();
        let items: SelectionDataset<Arc<dyn Dataset<I>>, I> =
            SelectionDataset::from_indices_checked(self.dataset.clone(), plan.concat());
        let strategy = Planned {
            sizes,
            items: Vec::new(),
        };
        let (items, batcher) = (Arc::new(items), self.batcher.clone());
        BatchDataLoader::new(Box::new(strategy), items, batcher, device.clone(), None)
    }
}

fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn shuffle(len: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let mut items: Vec<usize> = (0..len).collect();
    items.shuffle(rng);
    items
}

fn chunks(items: &[usize], size: usize) -> Plan {
    items.chunks(size).map(<[usize]>::to_vec).collect()
}

/// Cuts the loader's stream of items at the sizes of the plan.
struct Planned<I> {
    sizes: VecDeque<usize>,
    items: Vec<I>,
}

impl<I: Send + Sync + 'static> BatchStrategy<I> for Planned<I> {
    fn add(&mut self, item: I) {
        self.items.push(item);
    }

    fn batch(&mut self, force: bool) -> Option<Vec<I>> {
        let full = self
            .sizes
            .front()
            .is_some_and(|&size| self.items.len() == size);
        if !(full || force) || self.items.is_empty() {
            return None;
        }
        self.sizes.pop_front();
        Some(std::mem::take(&mut self.items))
    }

    fn clone_dyn(&self) -> Box<dyn BatchStrategy<I>> {
        Box::new(Self {
            sizes: self.sizes.clone(),
            items: Vec::new(),
        })
    }

    fn batch_size(&self) -> Option<usize> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::data::dataloader::DataLoader;
    use burn::data::dataset::InMemDataset;
    use burn_flex::{Flex, FlexDevice};

    struct Lists;

    impl Batcher<Flex, usize, Vec<usize>> for Lists {
        fn batch(&self, items: Vec<usize>, _: &FlexDevice) -> Vec<usize> {
            items
        }
    }

    type Feed = Batches<Flex, usize, Vec<usize>>;

    fn numbers(n: usize) -> InMemDataset<usize> {
        InMemDataset::new((0..n).collect())
    }

    fn epoch(feed: &Feed, seed: u64, skip: usize) -> Plan {
        feed.epoch(seed, skip, &FlexDevice).iter().collect()
    }

    #[test]
    fn sequential_keeps_the_order_and_the_rest() {
        let feed = Feed::sequential(numbers(5), Lists, 2);
        assert_eq!(feed.len(), 3);
        assert_eq!(epoch(&feed, 1, 0), [vec![0, 1], vec![2, 3], vec![4]]);
    }

    #[test]
    fn shuffled_sees_every_item_once_in_an_order_of_the_seed() {
        let feed = Feed::shuffled(numbers(23), Lists, 4);
        let first = epoch(&feed, 1, 0);
        assert_eq!(first, epoch(&feed, 1, 0));
        assert_ne!(first, epoch(&feed, 2, 0));
        let mut items = first.concat();
        items.sort_unstable();
        assert_eq!(items, (0..23).collect::<Vec<_>>());
    }

    #[test]
    fn skipping_gives_the_rest_of_the_same_epoch_without_reading_the_skipped() {
        struct Reads(Arc<std::sync::atomic::AtomicUsize>);
        impl Dataset<usize> for Reads {
            fn get(&self, index: usize) -> Option<usize> {
                self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                Some(index)
            }
            fn len(&self) -> usize {
                23
            }
        }
        let reads = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let feed = Feed::shuffled(Reads(reads.clone()), Lists, 4);
        let whole = epoch(&feed, 9, 0);
        reads.store(0, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(epoch(&feed, 9, 4), whole[4..]);
        assert_eq!(reads.load(std::sync::atomic::Ordering::Relaxed), 7);
        assert!(epoch(&feed, 9, 6).is_empty());
    }

    #[test]
    fn buckets_hold_similar_lengths_in_random_order() {
        let lengths: Vec<usize> = (0..40).map(|i| (i * 7) % 10).collect();
        let feed = Feed::bucketed(numbers(40), Lists, 4, lengths.clone());
        let batches = epoch(&feed, 3, 0);
        let spans: Vec<_> = batches
            .iter()
            .map(|b| lengths[b[0]]..=lengths[b[3]])
            .collect();
        assert!(
            batches
                .iter()
                .zip(&spans)
                .all(|(b, s)| b.iter().all(|&i| s.contains(&lengths[i])))
        );
        assert!(
            spans.iter().all(|s| s.start() == s.end()),
            "4 items of each length: {spans:?}"
        );
        assert!(
            !spans.is_sorted_by_key(|s| *s.start()),
            "batches are shuffled"
        );
        assert_ne!(batches, epoch(&feed, 4, 0));
    }

    #[test]
    fn plans_may_have_batches_of_any_size() {
        let feed = Feed::planned(numbers(6), Lists, |_| {
            vec![vec![5], vec![0, 1, 2], vec![3, 4]]
        });
        assert_eq!(epoch(&feed, 0, 0), [vec![5], vec![0, 1, 2], vec![3, 4]]);
        assert_eq!(epoch(&feed, 0, 1), [vec![0, 1, 2], vec![3, 4]]);
    }
}
