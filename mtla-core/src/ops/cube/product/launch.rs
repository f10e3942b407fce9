//! How a product is laid out on a device, and its launch.

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, cubecl, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::{ir::DeviceProperties, prelude::*};

use super::{
    super::{
        super::{LaunchKind, launches},
        device::{is_float, vector},
        memory::empty,
    },
    kernel::{PlacesLaunch, product_kernel},
};

/// Rows, at most: with more, Burn's own products win, and where they use tensor cores, they do from few on. Browsers
/// compile at every visit, and Burn's take them long.
const ROWS: usize = if cfg!(target_family = "wasm") {
    128
} else {
    24
};
const ROWS_BESIDE_TENSOR_CORES: usize = 8;
/// Rows that a cube computes together.
const ROWS_AT_ONCE: usize = 4;
/// Units that are neighbours in memory, and as many of those as are in a cube: more where a single row has long sums,
/// which would keep too few units busy.
const LANES: usize = 8;
const LINES: usize = 8;
const LINES_OF_LONG_SUMS: usize = 32;
const LONG: usize = 512;

/// Sizes that the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) units: usize,
    /// Rows and columns of a cube, the latter in vectors of the result.
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Units that share the sum of a column.
    pub(super) parts: usize,
    /// Whether neighbours in the weight are columns of the result, and else inputs of a column.
    pub(super) along_columns: bool,
}

impl Shape {
    fn new(rows: usize, inputs: usize, along_columns: bool) -> Self {
        let lines = if rows == 1 && inputs >= LONG {
            LINES_OF_LONG_SUMS
        } else {
            LINES
        };
        let (columns, parts) = if along_columns {
            (LANES, lines)
        } else {
            (lines, LANES)
        };
        Self {
            units: LANES * lines,
            rows: if rows == 1 { 1 } else { ROWS_AT_ONCE },
            columns,
            parts,
            along_columns,
        }
    }
}

/// The matrices of all heads in one weight. Counted in elements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Matrices {
    pub(super) heads: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    /// The column of the weight that the first head's begins with, and from a head's to the next one's.
    pub(super) first: usize,
    pub(super) block: usize,
    /// Whether columns of the weight are inputs.
    pub(super) transposed: bool,
}

/// A product as it will be launched.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ProductPlan {
    matrices: Matrices,
    rows: usize,
    /// Channels of a head, before and after.
    width: usize,
    new_width: usize,
    pub(super) dtype: DType,
}

impl ProductPlan {
    /// Of `rows` of heads that have `width` channels each; nothing where Burn's own product is to be taken.
    pub(super) fn new(
        matrices: Matrices,
        [rows, width]: [usize; 2],
        [of_rows, of_weight]: [DType; 2],
        device: &DeviceProperties,
    ) -> Option<Self> {
        let Matrices {
            heads,
            inputs,
            outputs,
            ..
        } = matrices;
        let most = if device.features.matmul.cmma.is_empty() {
            ROWS
        } else {
            ROWS_BESIDE_TENSOR_CORES
        };
        let new_width = outputs + width - inputs;
        let (most_columns, most_rows, most_heads) = device.hardware.max_cube_count;
        // Cubes never have more of them than columns of one element.
        let fits = new_width <= most_columns as usize
            && rows <= most_rows as usize
            && heads <= most_heads as usize
            && device.hardware.max_units_per_cube as usize >= LANES * LINES_OF_LONG_SUMS;
        let something = rows > 0 && heads > 0 && inputs > 0 && outputs > 0;
        let types = of_rows == of_weight && is_float(of_rows, device);
        (rows <= most && fits && something && types).then_some(Self {
            matrices,
            rows,
            width,
            new_width,
            dtype: of_rows,
        })
    }

    /// The result, of these dimensions.
    pub(super) fn launch<R: CubeRuntime>(
        &self,
        x: CubeTensor<R>,
        weight: CubeTensor<R>,
        dims: &[usize],
    ) -> CubeTensor<R> {
        launches::count(LaunchKind::CubeProduct);
        let x = into_contiguous(x);
        let weight = if weight.meta.strides().contains(&1) {
            weight
        } else {
            into_contiguous(weight)
        };
        let (shape, [of_x, of_weight, of_out], places) = self.lay_out(&x, &weight);
        let client = x.client.clone();
        let cubes = CubeCount::Static(
            (self.new_width / of_out).div_ceil(shape.columns) as u32,
            self.rows.div_ceil(shape.rows) as u32,
            self.matrices.heads as u32,
        );
        let out = empty(&client, &x.device, dims.to_vec().into(), self.dtype);
        let rest = (self.width > self.matrices.inputs).then(|| x.clone().into_tensor_arg());
        let address = [&x, &weight, &out]
            .map(CubeTensor::required_address_type)
            .into_iter()
            .max()
            .expect("there are some");
        // SAFETY: columns and rows are held within the result, and the matrices lie within the weight, as was checked.
        unsafe {
            product_kernel::launch_unchecked::<R>(
                &client,
                cubes,
                CubeDim::new_1d(shape.units as u32),
                address,
                of_x,
                of_weight,
                of_out,
                x.into_tensor_arg(),
                weight.into_tensor_arg(),
                rest.into(),
                out.clone().into_tensor_arg(),
                places,
                shape,
                self.dtype.into(),
            );
        }
        out
    }

    /// Sizes, elements of a vector of `x`, of the weight and of the result, and where things are in them.
    fn lay_out<R: CubeRuntime>(
        &self,
        x: &CubeTensor<R>,
        weight: &CubeTensor<R>,
    ) -> (Shape, [usize; 3], PlacesLaunch<R>) {
        let m = self.matrices;
        let [by_line, by_element] = [0, 1].map(|axis| weight.meta.strides()[axis]);
        let (by_input, by_column) = if m.transposed {
            (by_element, by_line)
        } else {
            (by_line, by_element)
        };
        let (first, by_head) = (m.first * by_element, m.block * by_element);
        let along_columns = by_column == 1;

        // All that vectors of the weight have to divide, and those of what is read or written beside them.
        let begin = |x: &CubeTensor<R>| {
            x.handle.offset_start.unwrap_or_default() as usize / self.dtype.size()
        };
        let (step, length, beside) = if along_columns {
            (by_input, m.outputs, [self.new_width, 0])
        } else {
            (by_column, m.inputs, [self.width, begin(x)])
        };
        let [width, begins] = beside;
        let widths = [step, length, first, by_head, begin(weight), width, begins];
        let n = vector(&widths, self.dtype.size(), x.client.properties());
        let ([of_x, of_out], [by_column, by_input]) = if along_columns {
            ([1, n], [1, step / n])
        } else {
            ([n, 1], [step / n, 1])
        };
        let places = PlacesLaunch::new(
            self.rows as u32,
            self.width as u32,
            (m.inputs / of_x) as u32,
            (m.outputs / of_out) as u32,
            (first / n) as u32,
            (by_head / n) as u32,
            by_column as u32,
            by_input as u32,
        );
        let shape = Shape::new(self.rows, m.inputs, along_columns);
        (shape, [of_x, n, of_out], places)
    }
}
