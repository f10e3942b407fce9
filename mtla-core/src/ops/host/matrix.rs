//! Views of tensors and of scratch memory as matrices, and their products.
//!
//! All unsafe code of the host operations is here: views check their ranges when they are made, so that the
//! pointers handed to the `gemm` crate stay inside the memory they came from.

use std::marker::PhantomData;

use burn_flex::FlexTensor;

use super::{
    real::{Real, add_scaled},
    threads::parallelism,
};

/// A matrix somewhere in memory.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, R> {
    start: *const R,
    rows: usize,
    columns: usize,
    row_stride: isize,
    column_stride: isize,
    memory: PhantomData<&'a [R]>,
}

// SAFETY: a shared borrow of memory, of which nothing but numbers is read.
unsafe impl<R: Sync> Send for Matrix<'_, R> {}
// SAFETY: as above.
unsafe impl<R: Sync> Sync for Matrix<'_, R> {}

impl<'a, R: Real> Matrix<'a, R> {
    /// `rows` rows of `columns` entries, one after the other.
    pub(super) fn new(memory: &'a [R], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * row_stride + columns <= memory.len());
        Self {
            start: memory.as_ptr(),
            rows,
            columns,
            row_stride: row_stride as isize,
            column_stride: 1,
            memory: PhantomData,
        }
    }

    /// Without the first `n` rows.
    pub(super) fn rows_from(self, n: usize) -> Self {
        assert!(n <= self.rows);
        Self {
            start: self.start.wrapping_offset(n as isize * self.row_stride),
            rows: self.rows - n,
            ..self
        }
    }

    /// Columns `first..first + n`.
    pub(super) fn columns(self, first: usize, n: usize) -> Self {
        assert!(first + n <= self.columns);
        Self {
            start: self
                .start
                .wrapping_offset(first as isize * self.column_stride),
            columns: n,
            ..self
        }
    }

    pub(super) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// A view of `tensor [rows, columns]`, whose strides are not negative (see [`in_order`]).
    pub(super) fn of(tensor: &'a FlexTensor) -> Self {
        let layout = tensor.layout();
        let (shape, strides) = (layout.shape(), layout.strides());
        let [rows, columns] = [shape[0], shape[1]];
        let memory = tensor.storage::<R>();
        let offset = layout.start_offset();
        assert!(strides[0] >= 0 && strides[1] >= 0);
        if rows > 0 && columns > 0 {
            let last = (rows - 1) * strides[0] as usize + (columns - 1) * strides[1] as usize;
            assert!(offset + last < memory.len());
        }
        Self {
            start: memory.as_ptr().wrapping_add(offset),
            rows,
            columns,
            row_stride: strides[0],
            column_stride: strides[1],
            memory: PhantomData,
        }
    }

    /// `self · right`, on all cores if it is worth it.
    pub(super) fn product(self, right: Self) -> Vec<R> {
        let (m, n) = (self.rows, right.columns);
        let mut target = vec![R::default(); m * n];
        let one = R::of(1.0);
        let cores = parallelism(m * n * self.columns);
        self.gemm(right, one, &mut target, n, false, cores);
        target
    }

    /// `target ← factor · self · right (+ target)`, where target has rows of `row_stride` entries.
    pub(super) fn times(
        self,
        right: Self,
        factor: R,
        target: &mut [R],
        row_stride: usize,
        accumulate: bool,
    ) {
        let one_core = gemm::Parallelism::None;
        self.gemm(right, factor, target, row_stride, accumulate, one_core);
    }

    fn gemm(
        self,
        right: Self,
        factor: R,
        target: &mut [R],
        row_stride: usize,
        accumulate: bool,
        cores: gemm::Parallelism,
    ) {
        let (m, n) = (self.rows, right.columns);
        assert!(m == 0 || (m - 1) * row_stride + n <= target.len());
        // SAFETY: the target is checked above, and borrowed mutably, so that it is none of the other two.
        unsafe {
            self.gemm_to(
                right,
                factor,
                target.as_mut_ptr(),
                row_stride,
                accumulate,
                cores,
            );
        }
    }

    /// # Safety
    /// `target` has `self.rows` rows of `right.columns` entries, `row_stride` apart, which nobody else reads or writes.
    unsafe fn gemm_to(
        self,
        right: Self,
        factor: R,
        target: *mut R,
        row_stride: usize,
        accumulate: bool,
        cores: gemm::Parallelism,
    ) {
        assert_eq!(self.columns, right.rows);
        // SAFETY: the views were checked when they were made, and the target is what the caller promises.
        unsafe {
            gemm::gemm(
                self.rows,
                right.columns,
                self.columns,
                target,
                1,
                row_stride as isize,
                accumulate,
                self.start,
                self.column_stride,
                self.row_stride,
                right.start,
                right.column_stride,
                right.row_stride,
                R::of(1.0),
                factor,
                false,
                false,
                false,
                cores,
            );
        }
    }
}

/// A tensor `[batch, heads, n, width]` with any strides but the last, which is 1.
#[derive(Clone, Copy)]
pub(super) struct Heads<'a, R> {
    memory: &'a [R],
    offset: usize,
    strides: [usize; 3],
    width: usize,
}

impl<'a, R: Real> Heads<'a, R> {
    /// A view of `tensor`, whose rows have to lie in one piece (see [`in_rows`]).
    pub(super) fn new(tensor: &'a FlexTensor) -> Self {
        let layout = tensor.layout();
        let strides: Vec<usize> = layout
            .strides()
            .iter()
            .map(|stride| usize::try_from(*stride).expect("rows lie in order"))
            .collect();
        assert_eq!(strides[3], 1, "rows lie in one piece");
        Self {
            memory: tensor.storage::<R>(),
            offset: layout.start_offset(),
            strides: [strides[0], strides[1], strides[2]],
            width: layout.shape()[3],
        }
    }

    /// The last token of every `stride` as if there were no others.
    pub(super) fn chunk_ends(self, stride: usize) -> Self {
        let [batch, head, token] = self.strides;
        Self {
            offset: self.offset + (stride - 1) * token,
            strides: [batch, head, stride * token],
            ..self
        }
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Entry `[b, h, i, ..]`.
    #[inline]
    pub(super) fn row(&self, b: usize, h: usize, i: usize) -> &'a [R] {
        let [batch, head, token] = self.strides;
        &self.memory[self.offset + b * batch + h * head + i * token..][..self.width]
    }

    /// Rows `i..i + n` of a head.
    pub(super) fn tokens(&self, b: usize, h: usize, i: usize, n: usize) -> Matrix<'a, R> {
        let [batch, head, token] = self.strides;
        let start = self.offset + b * batch + h * head + i * token;
        Matrix::new(&self.memory[start..], n, self.width, token)
    }

    /// Row `i` of heads `h..h + n`.
    pub(super) fn heads(&self, b: usize, h: usize, i: usize, n: usize) -> Matrix<'a, R> {
        let [batch, head, token] = self.strides;
        let start = self.offset + b * batch + h * head + i * token;
        Matrix::new(&self.memory[start..], n, self.width, head)
    }
}

/// `tensor` without negative strides, copied only if it has some.
pub(super) fn in_order(tensor: FlexTensor) -> FlexTensor {
    if tensor.layout().strides().iter().all(|stride| *stride >= 0) {
        return tensor;
    }
    tensor.to_contiguous()
}

/// `tensor` with rows that lie in one piece, copied only if they do not yet.
pub(super) fn in_rows(tensor: FlexTensor) -> FlexTensor {
    let strides = tensor.layout().strides();
    if strides.last() == Some(&1) && strides.iter().all(|stride| *stride >= 0) {
        return tensor;
    }
    tensor.to_contiguous()
}

/// A new tensor `[batch, heads, n, width]` that lies token by token (`[batch, n, heads, width]` in memory,
/// as projections leave and take their rows), written by several threads, each its own rows.
pub(super) struct NewHeads<R> {
    memory: Vec<R>,
    shape: [usize; 4],
}

impl<R: Real> NewHeads<R> {
    pub(super) fn zeros(shape: [usize; 4]) -> Self {
        Self {
            memory: vec![R::default(); shape.iter().product()],
            shape,
        }
    }

    pub(super) fn writer(&mut self) -> HeadsWriter<'_, R> {
        HeadsWriter {
            start: self.memory.as_mut_ptr(),
            shape: self.shape,
            memory: PhantomData,
        }
    }

    /// Adds up every `n` neighbouring heads.
    pub(super) fn sum_heads(self, n: usize) -> Self {
        if n == 1 {
            return self;
        }
        let [batch, heads, tokens, width] = self.shape;
        let mut sums = Self::zeros([batch, heads / n, tokens, width]);
        let heads = self.memory.chunks_exact(n * width);
        for (sum, heads) in sums.memory.chunks_exact_mut(width).zip(heads) {
            for head in heads.chunks_exact(width) {
                add_scaled(sum, R::of(1.0), head);
            }
        }
        sums
    }

    /// Adds up all heads.
    pub(super) fn sum_all_heads(self) -> Self {
        let heads = self.shape[1];
        self.sum_heads(heads)
    }

    /// The tensor.
    pub(super) fn into_tensor(self) -> FlexTensor {
        let [batch, heads, n, width] = self.shape;
        let tokens = self.into_tokens();
        tokens
            .reshape([batch, n, heads, width].into())
            .permute(&[0, 2, 1, 3])
    }

    /// As it lies in memory: `[batch · n, heads, width]`.
    pub(super) fn into_tokens(self) -> FlexTensor {
        let [batch, heads, n, width] = self.shape;
        let bytes = burn::tensor::Bytes::from_elems(self.memory);
        let layout = burn_flex::Layout::contiguous([batch * n, heads, width].into());
        FlexTensor::new(bytes, layout, R::dtype())
    }
}

/// Writes the rows of a [`NewHeads`].
pub(super) struct HeadsWriter<'a, R> {
    start: *mut R,
    shape: [usize; 4],
    memory: PhantomData<&'a mut [R]>,
}

// SAFETY: threads write different rows (the contract of `row`), and nothing else reads or writes meanwhile,
// since the memory is borrowed mutably.
unsafe impl<R: Send> Send for HeadsWriter<'_, R> {}
// SAFETY: as above.
unsafe impl<R: Send> Sync for HeadsWriter<'_, R> {}

impl<R: Real> HeadsWriter<'_, R> {
    /// Writes `left · right` into the first channels of head `h` of all tokens.
    ///
    /// # Safety
    /// No thread may hold a row of this head, and no two threads may write the same head.
    pub(super) unsafe fn head(
        &self,
        b: usize,
        h: usize,
        left: Matrix<'_, R>,
        right: Matrix<'_, R>,
    ) {
        let [batch, heads, n, width] = self.shape;
        assert!(b < batch && h < heads && left.rows == n && right.columns <= width);
        let one = R::of(1.0);
        let cores = gemm::Parallelism::None;
        // SAFETY: inside the memory, and nobody else's by contract.
        unsafe {
            let start = self.start.add((b * n * heads + h) * width);
            left.gemm_to(right, one, start, heads * width, false, cores);
        }
    }

    /// Entry `[b, h, i, ..]`.
    ///
    /// # Safety
    /// No two threads may hold the same row, and no thread may hold it twice.
    #[expect(clippy::mut_from_ref, reason = "the rows are different ones")]
    pub(super) unsafe fn row(&self, b: usize, h: usize, i: usize) -> &mut [R] {
        let [batch, heads, n, width] = self.shape;
        assert!(b < batch && h < heads && i < n);
        let start = ((b * n + i) * heads + h) * width;
        // SAFETY: inside the memory, and nobody else's by contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), width) }
    }
}
