//! Operations refuse operands that do not fit together, and name the one at fault.

use mtla_core::{
    cache::SlotLayout,
    ops::{AttendProblem, DecodeProblem, ProblemError, Visibility},
};

type Shape = [usize; 4];
type Pair = Option<(Shape, Shape)>;

const Q: Shape = [2, 4, 5, 6];
const COLUMNS: Pair = Some(([2, 2, 3, 6], [2, 2, 3, 7]));
const OWN: Pair = Some(([2, 2, 5, 6], [2, 2, 5, 7]));

fn attend() -> AttendProblem {
    AttendProblem {
        batch: 2,
        heads: 4,
        kv_heads: 2,
        queries: 5,
        columns: 3,
        self_term: true,
        key_width: 6,
        value_width: 7,
        visibility: causal(vec![0, 1]),
        lengths: vec![5, 5],
        scale: 1.0,
        dropout: None,
    }
}

fn causal(offsets: Vec<usize>) -> Visibility {
    Visibility::Causal { stride: 2, offsets }
}

/// The operand at fault.
#[track_caller]
fn operand(result: Result<(), ProblemError>) -> &'static str {
    match result.unwrap_err() {
        ProblemError::Shape { operand, .. } => operand,
        other => panic!("{other}"),
    }
}

#[test]
fn operands_of_attend() {
    assert_eq!(attend().validate(Q, COLUMNS, OWN), Ok(()));
    let error = attend().validate([2, 4, 5, 5], COLUMNS, OWN).unwrap_err();
    assert_eq!(
        error.to_string(),
        "q has shape [2, 4, 5, 5], expected [2, 4, 5, 6]"
    );
    for axis in 0..4 {
        let (mut q, mut columns, mut own) = (Q, [COLUMNS; 2], [OWN; 2]);
        q[axis] += 1;
        for pairs in [&mut columns, &mut own] {
            pairs[0].as_mut().expect("keys").0[axis] += 1;
            pairs[1].as_mut().expect("values").1[axis] += 1;
        }
        let checked = |q, columns, own| operand(attend().validate(q, columns, own));
        assert_eq!(checked(q, COLUMNS, OWN), "q");
        assert_eq!(checked(Q, columns[0], OWN), "k");
        assert_eq!(checked(Q, columns[1], OWN), "v");
        assert_eq!(checked(Q, COLUMNS, own[0]), "self k");
        assert_eq!(checked(Q, COLUMNS, own[1]), "self v");
    }
    let error = attend().validate(Q, None, None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "there are neither columns nor a self term to attend to"
    );
}

#[test]
fn numbers_of_attend() {
    let rejects = |change: fn(&mut AttendProblem), expected: &str| {
        let mut problem = attend();
        change(&mut problem);
        let error = problem.validate(Q, COLUMNS, OWN).unwrap_err();
        assert_eq!(error.to_string(), expected);
    };
    rejects(
        |p| p.kv_heads = 0,
        "4 query heads cannot be grouped over 0 key/value heads",
    );
    rejects(
        |p| p.kv_heads = 3,
        "4 query heads cannot be grouped over 3 key/value heads",
    );
    rejects(|p| p.lengths = vec![5], "lengths has 1 entries for 2 rows");
    rejects(
        |p| p.visibility = causal(vec![0; 3]),
        "offsets has 3 entries for 2 rows",
    );
    rejects(
        |p| p.visibility = Visibility::Prefix { lengths: vec![3] },
        "visible lengths has 1 entries for 2 rows",
    );
    rejects(
        |p| p.visibility = causal(vec![0, 3]),
        "row 1 ends at token 7 and needs 4 columns, 3 were given",
    );
}

#[test]
fn operands_of_decode() {
    let problem = DecodeProblem {
        heads: 3,
        layout: SlotLayout::Latent {
            rank: 4,
            rope_dim: 2,
        },
        stride: 2,
        starts: vec![5, 0],
        max_slots: 3,
        common: vec![0, 0],
        scale: 1.0,
    };
    let (q, row, gates, pool, table) = ([2, 3, 6], [2, 6], Some([3, 5]), [9, 6], [2, 4]);
    let turn = Some([2, 2, 1, 2]);
    assert_eq!(problem.validate(q, row, turn, gates, pool, table), Ok(()));
    let wrong = problem.validate([2, 3, 4], row, turn, gates, pool, table);
    assert_eq!(operand(wrong), "q");
    let wrong = problem.validate(q, [1, 6], turn, gates, pool, table);
    assert_eq!(operand(wrong), "row");
    let wrong = problem.validate(q, row, turn, gates, [9, 4], table);
    assert_eq!(operand(wrong), "pool");
    let wrong = problem.validate(q, row, turn, gates, pool, [2, 3]);
    assert_eq!(operand(wrong), "table");
    for turn in [[2, 3, 1, 2], [2, 2, 2, 2], [2, 1, 1, 6]] {
        let wrong = problem.validate(q, row, Some(turn), gates, pool, table);
        assert_eq!(operand(wrong), "rotation");
    }
    // Row 0 is in its third chunk: gates of two chunks are too few, of four are fine.
    for gates in [[2, 5], [3, 4]] {
        let wrong = problem.validate(q, row, turn, Some(gates), pool, table);
        assert_eq!(operand(wrong), "gate table");
    }
    assert_eq!(
        problem.validate(q, row, None, Some([4, 5]), pool, table),
        Ok(())
    );

    let without = DecodeProblem {
        common: vec![0],
        ..problem.clone()
    };
    let wrong = without.validate(q, row, None, None, pool, table);
    let expected = ProblemError::PerRow {
        list: "common slots",
        found: 1,
        rows: 2,
    };
    assert_eq!(wrong, Err(expected));

    let (heads, kv_heads) = (3, 2);
    let layout = SlotLayout::Dense {
        kv_heads,
        head_dim: 2,
    };
    let dense = DecodeProblem { layout, ..problem };
    let wrong = dense.validate([2, 3, 2], [2, 8], None, None, [9, 8], table);
    assert_eq!(wrong, Err(ProblemError::Heads { heads, kv_heads }));
}

#[cfg(feature = "flex")]
#[test]
#[should_panic(expected = "attend: k has shape [2, 2, 4, 6], expected [2, 2, 3, 6]")]
fn an_operation_names_the_operand_that_does_not_fit() {
    use burn::tensor::Tensor;
    use burn_flex::{Flex, FlexDevice};
    use mtla_core::ops::{AttendOperands, AttentionBackend, KeyValue, Keys};

    let zeros = |shape: Shape| Tensor::<Flex, 4>::zeros(shape, &FlexDevice);
    let operands = AttendOperands {
        q: zeros(Q),
        keys: Keys::Columns {
            columns: Some(KeyValue {
                k: zeros([2, 2, 4, 6]),
                shared: None,
                v: zeros([2, 2, 3, 7]),
            }),
            own: None,
        },
    };
    Flex::attend(operands, &attend());
}
