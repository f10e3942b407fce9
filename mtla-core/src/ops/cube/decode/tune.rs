//! The plan that is fastest on the device, measured once for all steps that are about alike.

use std::{fmt, ops::Deref};

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, CubeTuneId, cubecl};
use cubecl::{
    ir::DeviceProperties,
    tune::{AutotuneKey, LocalTuner, Tunable, TunableSet, local_tuner},
};
use serde::{Deserialize, Serialize};

use super::{
    super::{
        super::{DecodeProblem, LaunchKind, launches},
        fallback::Unavailable,
        memory::copy,
    },
    Operands,
    launch::Step,
    plan::{DECODE_PLANS, DecodePlan},
    shape::Types,
};
use crate::rope::RotaryLayout;

/// The plan that was reckoned, first, and its variants.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plans {
    key: Key,
    all: [DecodePlan; DECODE_PLANS.len()],
}

impl Plans {
    pub(super) fn new(
        problem: &DecodeProblem,
        rotary: Option<RotaryLayout>,
        types: Types,
        device: &DeviceProperties,
    ) -> Result<Self, Unavailable> {
        let plan = DecodePlan::new(problem, rotary, types, device)?;
        Ok(Self {
            key: Key::new(problem, &plan),
            all: plan.variants(problem, device),
        })
    }

    /// Launches the step once, by the plan that was fastest in steps like it. The first of them measures.
    pub(super) fn run<R: CubeRuntime>(&self, step: Step<R>) {
        static TUNER: LocalTuner<Key, CubeTuneId> = local_tuner!();
        let tunables = TUNER.init(|| {
            let set = TunableSet::new(
                |run: &Run<R>| run.plans.key,
                |_: &Key, run: &Run<R>| run.trial(),
            );
            (0..DECODE_PLANS.len()).fold(set, |set, i| {
                set.with(Tunable::new(DECODE_PLANS[i], move |run: Run<R>| run.by(i)))
            })
        });
        let client = step.out.client.clone();
        let id = CubeTuneId::new(&client, &step.out.device);
        let run = Run {
            step,
            plans: *self,
            is_trial: false,
        };
        TUNER.execute(&id, &client, tunables, run);
    }
}

/// The reckoned plan.
impl Deref for Plans {
    type Target = DecodePlan;

    fn deref(&self) -> &DecodePlan {
        &self.all[0]
    }
}

/// The step itself, or one that only shows how long it takes.
#[derive(Clone)]
struct Run<R: CubeRuntime> {
    step: Step<R>,
    plans: Plans,
    is_trial: bool,
}

impl<R: CubeRuntime> Run<R> {
    /// All trials merge into the same copy of the pool: what comes of it does not matter.
    fn trial(&self) -> Self {
        let Step { operands, out } = &self.step;
        let step = Step {
            operands: Operands {
                pool: copy(&operands.pool),
                ..operands.clone()
            },
            out: copy(out),
        };
        Self {
            step,
            is_trial: true,
            ..*self
        }
    }

    /// A step runs by whatever plan was chosen for its like; a trial of the same plan again is no use.
    fn by(self, i: usize) -> Result<(), &'static str> {
        let plans = self.plans.all;
        if !self.is_trial {
            plans[i].run(self.step);
        } else if plans[..i].contains(&plans[i]) {
            return Err("tried already");
        } else {
            launches::count(LaunchKind::CubeDecodeTrial);
            plans[i].launch(self.step);
        }
        Ok(())
    }
}

/// What steps have in common for which the same variant is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Key {
    /// Of queries, pool and table.
    types: [DType; 3],
    vector: usize,
    /// Of a key, a value and a slot, in vectors.
    widths: [usize; 3],
    heads: usize,
    kv_heads: usize,
    is_gated: bool,
    is_turned: bool,
    /// Rounded up to powers of two.
    rows: usize,
    max_slots: usize,
    /// Whether rows have slots in common.
    in_common: bool,
}

impl Key {
    fn new(problem: &DecodeProblem, plan: &DecodePlan) -> Self {
        let DecodePlan { shape, types, .. } = plan;
        Self {
            types: [types.float, types.pool, types.table],
            vector: shape.vector,
            widths: [shape.key_width, shape.value_width, shape.slot_width],
            heads: problem.heads,
            kv_heads: shape.kv_heads,
            is_gated: shape.gated,
            is_turned: shape.turn.is_some(),
            rows: plan.rows.next_power_of_two(),
            max_slots: problem.max_slots.next_power_of_two(),
            in_common: problem.common.iter().any(|n| *n > 0),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl AutotuneKey for Key {}
