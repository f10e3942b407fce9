//! Many requests in one batch.

mod batch;

use std::collections::VecDeque;

use burn::tensor::TensorData;
use mtla_core::{cache::Cache, ops::AttentionBackend};

use super::{
    Event, EventKind, GenerationError, LanguageModel, Request, RequestId,
    search::{Outcome, Search},
};
use batch::{Answers, Batch};

/// Requests that are generated together, each with a configuration of its own. They come and go at any time.
///
/// What becomes of a request does not depend on the others, up to rounding in the model.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn_flex::Flex;
/// use mtla_core::attention::AttentionConfig;
/// use mtla_models::{decoder::DecoderConfig, generate::{Engine, EventKind, GenerationConfig, Request}};
///
/// # async fn run() -> Result<(), mtla_models::generate::GenerationError> {
/// let config = DecoderConfig::new(100, 2, AttentionConfig::mtla(32, 4));
/// let model = config.init::<Flex>(&Default::default()).unwrap();
/// let mut engine = Engine::new(&model);
///
/// let beams = GenerationConfig::new(8).with_num_beams(4);
/// engine.submit(Request::new([5, 6, 7], beams))?;
/// engine.advance().await?;
/// let sampling = GenerationConfig::new(3).with_temperature(0.8).with_num_return_sequences(2);
/// let second = engine.submit(Request::new([8], sampling))?;
/// while !engine.is_idle() {
///     for event in engine.advance().await? {
///         if let EventKind::Finished(completions) = event.kind {
///             assert_eq!(completions.len(), if event.request == second { 2 } else { 1 });
///         }
///     }
/// }
/// # Ok(())
/// # }
/// # burn::tensor::try_read_sync(run()).unwrap().unwrap();
/// # }
/// ```
#[derive(Debug)]
pub struct Engine<B: AttentionBackend, M: LanguageModel<B>> {
    model: M,
    cache: Cache<B>,
    waiting: VecDeque<Job>,
    /// The rows of the cache are those of the jobs, in this order.
    running: Vec<Job>,
    /// What the model was asked and has not answered yet.
    asked: Option<Batch<B>>,
    max_rows: usize,
    joint_stopping: bool,
    submitted: u64,
    peak_bytes: usize,
    observed_layers: Vec<usize>,
    observed: Vec<Observed>,
}

/// What a layer did with the newest tokens; see [`Engine::observe`].
#[derive(Debug, Clone)]
pub struct Observed {
    /// Number of the layer, from 0.
    pub layer: usize,
    /// The gates `[rows, tokens]` of the new tokens, where there are gates.
    pub gates: Option<TensorData>,
    /// The attention weights `[rows, heads, slots]`, if the call was a step.
    pub weights: Option<TensorData>,
}

/// A request on its way.
#[derive(Debug)]
struct Job {
    request: RequestId,
    search: Search,
    cancelled: bool,
}

impl<B: AttentionBackend, M: LanguageModel<B>> Engine<B, M> {
    /// An engine without requests. It takes a model, or a reference to one.
    ///
    /// Take a model without autodiff (`model.valid()` of one in training): generation needs no gradients,
    /// and would only keep what they need.
    pub fn new(model: M) -> Self {
        Self {
            cache: model.new_cache(),
            model,
            waiting: VecDeque::new(),
            running: Vec::new(),
            asked: None,
            max_rows: usize::MAX,
            joint_stopping: false,
            submitted: 0,
            peak_bytes: 0,
            observed_layers: Vec::new(),
            observed: Vec::new(),
        }
    }

    /// Sets how many rows (samples and beams) are computed together at most. Requests for which there is no
    /// room wait, and come in their order.
    #[must_use]
    pub fn with_max_rows(mut self, rows: usize) -> Self {
        self.max_rows = rows;
        self
    }

    /// Lets beam searches end together, as Hugging Face's do: one that expects nothing better still goes on, and may find
    /// something, while another of the running requests is not so far. Without this (and with
    /// [`EarlyStopping::Always`](super::EarlyStopping::Always)) each ends on its own, and the result does not depend on
    /// the others.
    #[must_use]
    pub fn with_joint_stopping(mut self) -> Self {
        self.joint_stopping = true;
        self
    }

    /// Takes a request; nothing is computed yet.
    ///
    /// # Errors
    /// [`GenerationError`] if it cannot work.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, GenerationError> {
        request.check(self.model.vocab_size())?;
        let rows = request.config.rows();
        if rows > self.max_rows {
            return Err(GenerationError::TooManyRows {
                rows,
                max_rows: self.max_rows,
            });
        }
        let id = RequestId(self.submitted);
        self.submitted += 1;
        self.waiting.push_back(Job {
            request: id,
            search: Search::new(request)?,
            cancelled: false,
        });
        Ok(id)
    }

    /// Ends a request; no more events come of it. Whether it was there to be ended.
    pub fn cancel(&mut self, request: RequestId) -> bool {
        let waiting = self.waiting.len();
        self.waiting.retain(|job| job.request != request);
        if self.waiting.len() < waiting {
            return true;
        }
        let mut running = self.running.iter_mut();
        let Some(job) = running.find(|job| job.request == request && !job.cancelled) else {
            return false;
        };
        job.cancelled = true;
        if self.asked.is_none() {
            self.drop_cancelled();
        }
        true
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.iter().all(|job| job.cancelled)
    }

    /// Ends all requests.
    pub fn clear(&mut self) {
        self.waiting.clear();
        self.running.clear();
        self.asked = None;
        self.cache.reorder(&[]);
    }

    /// Bytes of the cache that are in use, over all layers; what several beams or samples share counts once.
    pub fn live_bytes(&self) -> usize {
        self.cache.live_bytes()
    }

    /// The most that [`live_bytes`](Self::live_bytes) has been.
    pub fn peak_bytes(&self) -> usize {
        self.peak_bytes
    }

    /// Reads back from now on what `layers` do, for pictures, together with what is read anyway: see
    /// [`Cache::observe`]. [`observed`](Self::observed) gives it out.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn observe(&mut self, layers: &[usize]) {
        self.cache.observe(layers);
        self.observed_layers = layers.to_vec();
        self.observed.clear();
    }

    /// What the [observed](Self::observe) layers did in the last [`advance`](Self::advance): first with the rows that
    /// were there, a token each, then with the prompts of new requests, whose rows come after those.
    pub fn observed(&self) -> &[Observed] {
        &self.observed
    }

    /// Goes one token on with every request; what happened comes in the order in which the requests were
    /// submitted, then by sample. Nothing happens if there are no requests.
    ///
    /// If the future is dropped before it is ready, the next one takes up where it was.
    ///
    /// # Errors
    /// [`GenerationError`] if the device fails, which ends all requests.
    pub async fn advance(&mut self) -> Result<Vec<Event>, GenerationError> {
        if self.asked.is_none() {
            self.admit();
            self.asked = Batch::ask(
                &self.model,
                &mut self.cache,
                &self.running,
                &self.observed_layers,
            );
            self.peak_bytes = self.peak_bytes.max(self.cache.live_bytes());
        }
        let Some(asked) = &self.asked else {
            return Ok(Vec::new());
        };
        let answers = asked.answers().await;
        self.asked = None;
        match answers {
            Ok(mut answers) => {
                self.observed = answers.take_observed();
                Ok(self.take(&answers))
            }
            Err(error) => {
                self.clear();
                Err(GenerationError::Device(error))
            }
        }
    }

    /// The numbers of the waiting prompts are `first` higher.
    pub(super) fn renumber(&mut self, first: usize) {
        for job in &mut self.waiting {
            job.search.renumber(first);
        }
    }

    /// Lets requests in for which there is room.
    fn admit(&mut self) {
        let mut rows: usize = self.running.iter().map(|x| x.search.max_rows()).sum();
        while let Some(job) = self.waiting.front() {
            rows = rows.saturating_add(job.search.max_rows());
            if rows > self.max_rows {
                return;
            }
            self.running.extend(self.waiting.pop_front());
        }
    }

    /// Takes what the model says about every row.
    fn take(&mut self, answers: &Answers) -> Vec<Event> {
        let mut answers = answers.reader();
        let mut first = 0;
        let mut advanced = Vec::with_capacity(self.running.len());
        for mut job in std::mem::take(&mut self.running) {
            let rows = job.search.rows();
            let answer = answers.next(rows, job.search.is_plain());
            if !job.cancelled {
                let outcome = job.search.advance(answer);
                advanced.push((first, job, outcome));
            }
            first += rows;
        }
        let open = |outcome: &Outcome| outcome.completions.is_none() && !outcome.settled;
        let all_settled = !advanced
            .iter()
            .any(|(_, _, outcome)| outcome.as_ref().is_ok_and(open));

        let mut events = Vec::new();
        let mut order = Vec::new();
        for (first, mut job, outcome) in advanced {
            let outcome = outcome.map(|outcome| {
                if outcome.settled && (all_settled || !self.joint_stopping) {
                    job.search.end()
                } else {
                    outcome
                }
            });
            let (parents, over) = report(job.request, outcome, &mut events);
            if !over {
                order.extend(parents.into_iter().map(|row| first + row));
                self.running.push(job);
            }
        }
        let held = self.cache.rows();
        if !order.iter().copied().eq(0..held) {
            self.cache.reorder(&order);
        }
        events
    }

    /// Takes cancelled requests out of the batch.
    fn drop_cancelled(&mut self) {
        let mut order = Vec::new();
        let mut first = 0;
        for job in &self.running {
            let rows = first..first + job.search.rows();
            first = rows.end;
            if !job.cancelled {
                order.extend(rows);
            }
        }
        self.running.retain(|job| !job.cancelled);
        self.cache.reorder(&order);
    }
}

/// Makes events of what a step gave; the rows that are continued, and whether the request is over.
fn report(
    request: RequestId,
    outcome: Result<Outcome, GenerationError>,
    events: &mut Vec<Event>,
) -> (Vec<usize>, bool) {
    let mut push = |kind| events.push(Event { request, kind });
    match outcome {
        Ok(outcome) => {
            outcome
                .events
                .into_iter()
                .map(EventKind::Token)
                .for_each(&mut push);
            let over = outcome.completions.is_some();
            outcome.completions.map(EventKind::Finished).map(push);
            (outcome.parents, over)
        }
        Err(error) => {
            push(EventKind::Failed(error));
            (Vec::new(), true)
        }
    }
}
