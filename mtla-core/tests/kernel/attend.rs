//! Attention of whole sequences.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use burn_flex::{Flex, FlexDevice};
use burn_wgpu::WgpuDevice;
use mtla_core::{
    attention::AttentionConfig,
    cache::Cache,
    ops::{AttentionBackend, LaunchKind, launches, plain},
    testing::backends::{Wgpu, WgpuBare},
};

use crate::{
    alone,
    common::{
        Numbers,
        attend::{Case, Form, assert_close, counted, map},
        check, values,
    },
};
use proptest::prelude::any;

const FORMS: [Form; 3] = [Form::Tokens, Form::Columns, Form::Prefix];

/// Numbers of the host's on another device, in another type.
fn put<B: Backend>(x: Tensor<Flex, 4>, dtype: DType, device: &B::Device) -> Tensor<B, 4> {
    let data: TensorData = x.into_data().convert_dtype(dtype);
    Tensor::from_data(data, (device, dtype))
}

/// Runs cases on a backend, against the plain form in 64 bits on operands rounded to the type.
fn compare<B: AttentionBackend<Device = WgpuDevice>>(cases: u32, dtype: DType, tolerance: f64) {
    let device = WgpuDevice::default();
    for form in FORMS {
        for dropout in [false, true] {
            check(cases, any::<u64>(), |seed| {
                let mut case = Case::new(seed, form, dropout);
                let operands = case.operands();
                let before = launches(LaunchKind::CubeAttend);
                let found = map(&operands, &|x| put::<B>(x, dtype, &device));
                let found = counted(&case, B::attend(found, &case.problem));
                assert_eq!(launches(LaunchKind::CubeAttend), before + 1);
                let wide =
                    |x| put::<Flex>(put::<Flex>(x, dtype, &FlexDevice), DType::F64, &FlexDevice);
                let expected = plain::attend(map(&operands, &wide), &case.problem);
                let expected = counted(&case, expected);
                assert_close(
                    &[found],
                    &[expected],
                    tolerance,
                    &format!("{:?}", case.problem),
                );
            });
        }
    }
}

#[test]
fn attention_is_the_plain_one() {
    let _alone = alone();
    compare::<WgpuBare>(12, DType::F32, 1e-5);
    compare::<Wgpu>(3, DType::F32, 1e-5);
}

#[test]
fn half_precision_is_rounded_at_the_end() {
    let _alone = alone();
    if WgpuBare::supports_dtype(&WgpuDevice::default(), DType::F16) {
        compare::<WgpuBare>(4, DType::F16, 1.01 * 2f64.powi(-11) + 1e-5);
    }
}

/// A prompt, and more tokens on a warm cache, are one launch each.
#[test]
fn prompts_are_prefilled_with_the_kernel() {
    fn context<B: AttentionBackend>(
        device: &B::Device,
        config: &AttentionConfig,
        x: &TensorData,
    ) -> Vec<f64> {
        let attention = config.init::<B>(device).expect("a sound configuration");
        let attention = common_weights(attention);
        let mut cache = Cache::new(attention.cache_spec(), 1, device);
        let rows: Vec<usize> = cache.join(2).collect();
        let x = Tensor::<B, 3>::from_data(x.clone(), device);
        let mut found = Vec::new();
        for (first, count) in [(0, 7), (7, 4)] {
            let plan = cache.extend(&rows, &[count; 2]);
            let part = x.clone().narrow(1, first, count);
            found.extend(values(attention.prefill(part, &plan, cache.layer_mut(0))));
        }
        found
    }
    let _alone = alone();
    for config in [
        AttentionConfig::mha(32, 4),
        AttentionConfig::gqa(32, 4, 2),
        AttentionConfig::mla(32, 4),
        AttentionConfig::mtla(32, 4),
        AttentionConfig::mtla(32, 4).with_down_rate(3),
    ] {
        let x = TensorData::new(Numbers::new(5).normals(2 * 11 * 32), [2, 11, 32]);
        let before = launches(LaunchKind::CubeAttend);
        let found = context::<Wgpu>(&WgpuDevice::default(), &config, &x);
        assert_eq!(launches(LaunchKind::CubeAttend), before + 2, "{config:?}");
        let expected = context::<Flex>(&FlexDevice, &config, &x);
        assert_close(&[found], &[expected], 1e-4, &format!("{config:?}"));
    }
}

/// Every weight by its place, so that two backends have the same.
fn common_weights<B: Backend, M: Module<B>>(module: M) -> M {
    struct Numbered(u64);
    impl<B: Backend> ModuleMapper<B> for Numbered {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            self.0 += 1;
            let seed = self.0;
            param.map(|x| {
                let (shape, device) = (x.dims(), x.device());
                let values = Numbers::new(seed).normals(shape.iter().product());
                let values: Vec<f64> = values.iter().map(|x| 0.2 * x).collect();
                Tensor::from_data(TensorData::new(values, shape), &device)
            })
        }
    }
    module.map(&mut Numbered(0))
}
