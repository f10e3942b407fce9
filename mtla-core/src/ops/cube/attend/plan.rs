//! How an attention of whole sequences is laid out on a device.

use burn::tensor::DType;
use burn_cubecl::cubecl;
use cubecl::ir::DeviceProperties;

use super::super::{
    super::{AttendProblem, Visibility},
    device::{SUMS, is_float, multiprocessors, vector},
    fallback::Unavailable,
};

/// Queries, and columns of a block, that a unit computes the scores of, at most.
const EACH: usize = 4;
/// The side of the square that the units of a cube stand in, and how many they are.
pub(super) const SIDE: usize = 8;
pub(super) const UNITS: usize = SIDE * SIDE;
/// Vectors of channels that are loaded at a time.
pub(super) const CHUNK: usize = SIDE;

/// Where there is a key of what a query has seen of its own running chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Own {
    /// Nowhere.
    None,
    /// In the place of its token in the row.
    OfToken,
    /// In a place of its own, one for each query.
    OfQuery,
}

/// Sizes that the kernel is compiled for. All widths are in vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    /// Elements of a vector.
    pub(super) vector: usize,
    /// Query heads of one key/value head.
    pub(super) group: usize,
    pub(super) kv_heads: usize,
    /// Channels of a whole key, and those of its head alone.
    pub(super) key_width: usize,
    pub(super) head_width: usize,
    pub(super) value_width: usize,
    /// Queries and columns of a unit.
    pub(super) each: usize,
    /// Whether a query sees the chunks before it, and else as many columns as its row has.
    pub(super) causal: bool,
    pub(super) own: Own,
    pub(super) dropout: bool,
}

impl Shape {
    /// Queries of a tile, and columns of a block.
    pub(super) const fn tile(&self) -> usize {
        self.each * SIDE
    }

    pub(super) const fn value_chunks(&self) -> usize {
        self.value_width.div_ceil(CHUNK)
    }
}

/// An attention as it will be launched.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct AttendPlan {
    pub(super) shape: Shape,
    pub(super) dtype: DType,
    /// Cubes side by side: tiles of queries, rows, key/value heads.
    pub(super) cubes: [u32; 3],
    /// For each row its first query's token, or how many columns it sees.
    pub(super) rows: Vec<usize>,
    pub(super) stride: u32,
}

impl AttendPlan {
    /// For keys of which `head_width` channels are their head's own; `dtypes` are those of all operands.
    pub(super) fn new(
        problem: &AttendProblem,
        head_width: usize,
        own: Own,
        dtypes: &[(&'static str, DType)],
        device: &DeviceProperties,
    ) -> Result<Self, Unavailable> {
        let dtype = dtypes[0].1;
        for (operand, found) in dtypes {
            if *found != dtype || !is_float(dtype, device) {
                let (operand, dtype) = (*operand, *found);
                return Err(Unavailable::Type { operand, dtype });
            }
        }
        let p = problem;
        let group = p.heads / p.kv_heads;
        let tiles = |each: usize| (p.queries * group).div_ceil(each * SIDE);
        // Large tiles read less, and small ones of few queries keep more of the device busy.
        let multiprocessors = multiprocessors(device);
        let mut each = EACH;
        while each > 1 && tiles(each) * p.batch * p.kv_heads < multiprocessors {
            each /= 2;
        }
        let tiles = tiles(each);
        let cubes = [tiles, p.batch, p.kv_heads].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let (most_tiles, most_rows, most_heads) = device.hardware.max_cube_count;
        let fits = cubes.iter().zip([most_tiles, most_rows, most_heads]);
        if !fits.into_iter().all(|(n, most)| (1..=most).contains(n)) {
            let (rows, kv_heads) = (p.batch, p.kv_heads);
            return Err(Unavailable::Grid { rows, kv_heads });
        }
        let widths = [p.key_width, head_width, p.value_width];
        let vector = vector(&widths, dtype.size(), device);
        let [key_width, head_width, value_width] = widths.map(|width| width / vector);
        let (causal, stride, rows) = match &p.visibility {
            Visibility::Causal { stride, offsets } => (true, *stride, offsets.clone()),
            Visibility::Prefix { lengths } => (false, 1, lengths.clone()),
        };
        let shape = Shape {
            vector,
            group,
            kv_heads: p.kv_heads,
            key_width,
            head_width,
            value_width,
            each,
            causal,
            own,
            dropout: p.dropout.is_some(),
        };
        let sums = each * shape.value_chunks() * vector;
        if sums > SUMS {
            return Err(Unavailable::Sums { sums, limit: SUMS });
        }
        Ok(Self {
            shape,
            dtype,
            cubes,
            rows,
            stride: stride as u32,
        })
    }
}
