//! Decoding by plans that are measured first.

use super::*;

/// Cases in which a token is added to a slot: twice would be wrong. Of different sizes, so that each is measured.
fn cases(seeds: Range<u64>, size: &'static Size) -> impl Iterator<Item = Case> {
    let adds = |case: &Case| {
        let stride = case.problem.stride;
        let mut starts = case.problem.starts.iter();
        case.gates.is_some() && starts.any(|start| !start.is_multiple_of(stride))
    };
    seeds.map(|seed| Case::new(seed, size)).filter(adds)
}

/// A step that measures and the same step once more, which knows, on a backend. Returns how many steps were tried.
fn measure_and_remember<B: AttentionBackend<Device = WgpuDevice>>(case: &Case) -> u64 {
    let expected = case.expected(F32);
    let trials = || launches(LaunchKind::CubeDecodeTrial);
    let [measured, remembered] = [0, 1].map(|_| {
        let (tried, [decoded, _]) = (trials(), counts());
        let operands = case.operands::<B>(&WgpuDevice::default(), F32);
        let found = found(B::decode(operands, &case.problem));
        assert_close(&found, &expected, CLOSE, &format!("{:?}", case.problem));
        assert_eq!(counts()[0], decoded + 1, "trials are counted apart");
        trials() - tried
    });
    assert_eq!(remembered, 0);
    measured
}

#[test]
fn steps_are_measured_once_and_merged_once() {
    let _alone = alone();
    for case in cases(0..6, &SMALL).chain(cases(2000..2002, &BEAMS)) {
        let trials = measure_and_remember::<WgpuBare>(&case);
        println!("{trials} trials: {:?}", case.problem);
        assert!(trials > 0);
    }
    for case in cases(6..9, &SMALL) {
        assert!(measure_and_remember::<Wgpu>(&case) > 0);
    }
}

/// Measuring leaves a pool where it is, too.
#[test]
fn what_is_measured_is_a_copy() {
    let _alone = alone();
    let case = cases(9..20, &SMALL).next().expect("most are");
    let operands = case.operands::<WgpuBare>(&WgpuDevice::default(), F32);
    let (before, tried) = (
        memory(&operands.pool),
        launches(LaunchKind::CubeDecodeTrial),
    );
    let (_, pool) = cube::try_decode(operands, &case.problem).expect("it fits");
    assert!(launches(LaunchKind::CubeDecodeTrial) > tried);
    assert_eq!(memory(&pool), before);
}
