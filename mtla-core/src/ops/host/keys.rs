//! Keys and values of an attention, and their gradients: whole rows of keys are put together from the
//! channels of each head and those that all heads share.

use super::{
    matrix::{Heads, HeadsWriter, Matrix, NewHeads},
    real::{Real, add_scaled, dot},
};

/// Keys `[batch, kv_heads, n, ..]` with the channels that all heads share, and values.
#[derive(Clone, Copy)]
pub(super) struct KeyView<'a, R> {
    pub(super) k: Heads<'a, R>,
    pub(super) shared: Option<Heads<'a, R>>,
    pub(super) v: Heads<'a, R>,
}

impl<'a, R: Real> KeyView<'a, R> {
    /// The last token of every `stride` as if there were no others.
    pub(super) fn chunk_ends(self, stride: usize) -> Self {
        Self {
            k: self.k.chunk_ends(stride),
            shared: self.shared.map(|shared| shared.chunk_ends(stride)),
            v: self.v.chunk_ends(stride),
        }
    }

    /// Keys `i..i + n` of a head; put together in `memory` where a part of them is shared.
    pub(super) fn keys<'b>(&self, [b, h, i, n]: [usize; 4], memory: &'b mut Vec<R>) -> Matrix<'b, R>
    where
        'a: 'b,
    {
        let Some(shared) = &self.shared else {
            return self.k.tokens(b, h, i, n);
        };
        memory.clear();
        for i in i..i + n {
            memory.extend_from_slice(self.k.row(b, h, i));
            memory.extend_from_slice(shared.row(b, 0, i));
        }
        let width = self.k.width() + shared.width();
        Matrix::new(memory, n, width, width)
    }

    /// `q · key`.
    #[inline(always)]
    #[expect(
        clippy::inline_always,
        reason = "it has to be part of a vectorised caller"
    )]
    pub(super) fn score(&self, q: &[R], [b, h, i]: [usize; 3]) -> R {
        let (head, rest) = q.split_at(self.k.width());
        let score = dot(head, self.k.row(b, h, i));
        match &self.shared {
            Some(shared) => score + dot(rest, shared.row(b, 0, i)),
            None => score,
        }
    }

    /// `target += factor · key`.
    #[inline(always)]
    #[expect(
        clippy::inline_always,
        reason = "it has to be part of a vectorised caller"
    )]
    pub(super) fn add_key(&self, target: &mut [R], factor: R, [b, h, i]: [usize; 3]) {
        let (head, rest) = target.split_at_mut(self.k.width());
        add_scaled(head, factor, self.k.row(b, h, i));
        if let Some(shared) = &self.shared {
            add_scaled(rest, factor, shared.row(b, 0, i));
        }
    }
}

/// Gradients of keys and values. Each task writes those of a key/value head of its own; what belongs together
/// is added up at the end.
pub(super) struct KeyGradients<R> {
    pub(super) k: NewHeads<R>,
    pub(super) shared: Option<NewHeads<R>>,
    pub(super) v: NewHeads<R>,
}

impl<R: Real> KeyGradients<R> {
    /// Zeros for `n` keys like those of `view`.
    pub(super) fn zeros(view: &KeyView<'_, R>, [batch, heads, n]: [usize; 3]) -> Self {
        let zeros = |like: &Heads<'_, R>| NewHeads::zeros([batch, heads, n, like.width()]);
        Self {
            k: zeros(&view.k),
            shared: view.shared.as_ref().map(zeros),
            v: zeros(&view.v),
        }
    }

    pub(super) fn writer(&mut self) -> KeyWriter<'_, R> {
        KeyWriter {
            k: self.k.writer(),
            shared: self.shared.as_mut().map(NewHeads::writer),
            v: self.v.writer(),
        }
    }

    /// Adds up every `parts` neighbouring heads, and all of them for the shared channels.
    pub(super) fn sum(self, parts: usize) -> Self {
        Self {
            k: self.k.sum_heads(parts),
            shared: self.shared.map(NewHeads::sum_all_heads),
            v: self.v.sum_heads(parts),
        }
    }
}

/// Writes [`KeyGradients`].
pub(super) struct KeyWriter<'a, R> {
    k: HeadsWriter<'a, R>,
    shared: Option<HeadsWriter<'a, R>>,
    v: HeadsWriter<'a, R>,
}

impl<R: Real> KeyWriter<'_, R> {
    /// Adds `key_factor · key` and `value_factor · value` to row `[b, h, i]`.
    ///
    /// # Safety
    /// No other thread may use this row meanwhile.
    #[inline(always)]
    #[expect(
        clippy::inline_always,
        reason = "it has to be part of a vectorised caller"
    )]
    pub(super) unsafe fn add(
        &self,
        [b, h, i]: [usize; 3],
        (key_factor, key): (R, &[R]),
        (value_factor, value): (R, &[R]),
    ) {
        // SAFETY: by contract; the rows of the three tensors are different memory.
        unsafe {
            let k = self.k.row(b, h, i);
            let (head, rest) = key.split_at(k.len());
            add_scaled(k, key_factor, head);
            if let Some(shared) = &self.shared {
                add_scaled(shared.row(b, h, i), key_factor, rest);
            }
            add_scaled(self.v.row(b, h, i), value_factor, value);
        }
    }
}
