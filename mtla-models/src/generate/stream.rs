//! A generation as a stream.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures_core::Stream;
use mtla_core::ops::AttentionBackend;

use super::{Generation, GenerationError, LanguageModel, TokenEvent};

type Step = Result<Vec<TokenEvent>, GenerationError>;
/// A generation that makes a step, and comes back with what it gave.
type Advancing<'m, B, M> = Pin<Box<dyn Future<Output = (Generation<'m, B, M>, Step)> + 'm>>;

/// The steps of a [`Generation`], as its iterator gives them, without waiting in between.
pub struct EventStream<'m, B: AttentionBackend, M: LanguageModel<B>>(State<'m, B, M>);

enum State<'m, B: AttentionBackend, M: LanguageModel<B>> {
    Resting(Box<Generation<'m, B, M>>),
    Advancing(Advancing<'m, B, M>),
    Over,
}

impl<B: AttentionBackend, M: LanguageModel<B>> std::fmt::Debug for EventStream<'_, B, M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventStream").finish_non_exhaustive()
    }
}

impl<'m, B: AttentionBackend, M: LanguageModel<B>> EventStream<'m, B, M> {
    pub(super) fn new(generation: Generation<'m, B, M>) -> Self {
        Self(State::Resting(Box::new(generation)))
    }
}

impl<B: AttentionBackend, M: LanguageModel<B>> Stream for EventStream<'_, B, M> {
    type Item = Step;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Step>> {
        let state = &mut self.get_mut().0;
        loop {
            match std::mem::replace(state, State::Over) {
                State::Over => return Poll::Ready(None),
                State::Resting(generation) if generation.is_done() => return Poll::Ready(None),
                State::Resting(mut generation) => {
                    *state = State::Advancing(Box::pin(async move {
                        let step = generation.advance().await;
                        (*generation, step)
                    }));
                }
                State::Advancing(mut future) => match future.as_mut().poll(context) {
                    Poll::Pending => {
                        *state = State::Advancing(future);
                        return Poll::Pending;
                    }
                    Poll::Ready((generation, step)) => {
                        *state = State::Resting(Box::new(generation));
                        return Poll::Ready(Some(step));
                    }
                },
            }
        }
    }
}
