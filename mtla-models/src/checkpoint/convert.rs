//! Numbers of a file as numbers of a tensor, and back.

use burn::tensor::{DType, Element, ElementConversion, TensorData, bf16, f16};
use safetensors::Dtype;

use super::{Layout, weights::Weight};

/// Side of the square blocks that a matrix is transposed by: both sides of a block stay in the cache.
const BLOCK: usize = 32;

/// The numbers of a weight in the type `dtype`; `None` if the file's type or `dtype` is not one of floats. They lie as
/// they do here, but those of [`Layout::Transposed`] as in the file.
///
/// Allocates what it returns and nothing else.
pub(super) fn read(weight: Weight<'_>, layout: Layout, dtype: DType) -> Option<TensorData> {
    match dtype {
        DType::F64 => read_as::<f64>(weight, layout),
        DType::F32 => read_as::<f32>(weight, layout),
        DType::F16 => read_as::<f16>(weight, layout),
        DType::BF16 => read_as::<bf16>(weight, layout),
        _ => None,
    }
}

fn read_as<E: Element>(weight: Weight<'_>, layout: Layout) -> Option<TensorData> {
    Some(match weight.dtype {
        Dtype::F32 => arrange::<E, 4>(weight, layout, |b| f32::from_le_bytes(b).elem()),
        Dtype::F16 => arrange::<E, 2>(weight, layout, |b| f16::from_le_bytes(b).to_f32().elem()),
        Dtype::BF16 => arrange::<E, 2>(weight, layout, |b| bf16::from_le_bytes(b).to_f32().elem()),
        _ => return None,
    })
}

fn arrange<E: Element, const N: usize>(
    weight: Weight<'_>,
    layout: Layout,
    number: impl Fn([u8; N]) -> E,
) -> TensorData {
    let (numbers, _) = weight.bytes.as_chunks::<N>();
    match (layout, weight.shape) {
        (Layout::Rearranged, &[outputs, inputs]) => {
            let values = transpose(outputs, inputs, |i| number(numbers[i]));
            TensorData::new(values, [inputs, outputs])
        }
        (_, shape) => {
            let values: Vec<E> = numbers.iter().map(|bytes| number(*bytes)).collect();
            TensorData::new(values, shape.to_vec())
        }
    }
}

/// The transpose of a `[rows, columns]` matrix whose entries are given by their number.
fn transpose<E: Element>(rows: usize, columns: usize, at: impl Fn(usize) -> E) -> Vec<E> {
    let mut values = vec![E::from_elem(0.0f32); rows * columns];
    for top in (0..rows).step_by(BLOCK) {
        for left in (0..columns).step_by(BLOCK) {
            for row in top..(top + BLOCK).min(rows) {
                for column in left..(left + BLOCK).min(columns) {
                    values[column * rows + row] = at(row * columns + column);
                }
            }
        }
    }
    values
}

/// The type of a file for numbers of the type `dtype`; `None` if files do not have it.
pub(super) fn file_type(dtype: DType) -> Option<Dtype> {
    match dtype {
        DType::F32 => Some(Dtype::F32),
        DType::F16 => Some(Dtype::F16),
        DType::BF16 => Some(Dtype::BF16),
        _ => None,
    }
}

/// The bytes of a file for the numbers of a tensor.
pub(super) fn write(data: TensorData, layout: Layout, dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F16 => bytes::<f16, 2>(data, DType::F16, layout, f16::to_le_bytes),
        Dtype::BF16 => bytes::<bf16, 2>(data, DType::BF16, layout, bf16::to_le_bytes),
        _ => bytes::<f32, 4>(data, DType::F32, layout, f32::to_le_bytes),
    }
}

fn bytes<E: Element, const N: usize>(
    data: TensorData,
    dtype: DType,
    layout: Layout,
    number: impl Fn(E) -> [u8; N],
) -> Vec<u8> {
    let data = data.convert_dtype(dtype);
    let values = data
        .as_slice::<E>()
        .expect("the type that it was converted to");
    let turned = match (layout, &data.shape[..]) {
        (Layout::Transposed | Layout::Rearranged, &[inputs, outputs]) => {
            Some(transpose(inputs, outputs, |i| values[i]))
        }
        _ => None,
    };
    let values = turned.as_deref().unwrap_or(values);
    values.iter().flat_map(|value| number(*value)).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn halves_and_matrices_survive() {
        let (rows, columns) = (37, 70);
        let values: Vec<f32> = (0..rows * columns).map(|i| i as f32 / 8.0 - 40.0).collect();
        for (dtype, file) in [
            (DType::F32, Dtype::F32),
            (DType::F16, Dtype::F16),
            (DType::BF16, Dtype::BF16),
        ] {
            for layout in [Layout::Same, Layout::Rearranged] {
                let data = TensorData::new(values.clone(), [rows, columns]).convert_dtype(dtype);
                let bytes = write(data.clone(), layout, file);
                let shape = match layout {
                    Layout::Same => [rows, columns],
                    _ => [columns, rows],
                };
                let weight = Weight {
                    path: Path::new(""),
                    dtype: file,
                    shape: &shape,
                    bytes: &bytes,
                };
                let again = read(weight, layout, dtype).unwrap();
                again.assert_eq(&data, true);
                let as_it_is = read(weight, Layout::Transposed, dtype).unwrap();
                assert_eq!(as_it_is.as_bytes(), &bytes[..]);
                assert_eq!(&as_it_is.shape[..], shape);
            }
        }
    }

    #[test]
    fn the_second_number_of_a_row_begins_the_second_row() {
        let data = TensorData::from([[1.0f32, 2.0, 3.0], [4.0, 5.0, 6.0]]);
        let bytes = write(data, Layout::Transposed, Dtype::F32);
        let (numbers, _) = bytes.as_chunks::<4>();
        let numbers: Vec<f32> = numbers.iter().map(|b| f32::from_le_bytes(*b)).collect();
        assert_eq!(numbers, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }
}
