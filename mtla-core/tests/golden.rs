//! Parity with the reference implementation: every recorded case found in the folder is read and compared,
//! chosen by what its JSON says. `MTLA_GOLDEN` names another root folder (with a folder `attention`).

use burn::{
    module::Param,
    tensor::{Int, Tensor, TensorData, backend::AutodiffBackend},
};
use burn_autodiff::Autodiff;
use mtla_core::{
    attention::{Attention, AttentionInput, CrossAttention, CrossInput},
    backend_tests,
    cache::{Cache, SlotLayout},
    ops::{AttentionBackend, LaunchKind, launches},
    testing::{
        Checks, Golden, golden_root, load_attention, load_cross_attention, names::Access, one_graph,
    },
};
use serde_json::Value;

backend_tests!(self_attention, cross_attention);

/// Absolute, on outputs, caches and weights.
const OUTPUT: f64 = 1e-5;
/// Relative to the largest entry, on gradients.
const GRADIENT: f64 = 1e-4;

fn cases() -> Vec<Golden> {
    let root = golden_root(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures"));
    Golden::load_all(&root.join("attention"))
}

fn is_cross(case: &Golden) -> bool {
    case.flag("cross_att")
}

fn self_attention<B: AttentionBackend>(device: &B::Device) {
    let mut checks = Checks::default();
    let own_forms_ran = own_forms_run::<B>(device);
    let cases: Vec<Golden> = cases().into_iter().filter(|case| !is_cross(case)).collect();
    for case in &cases {
        let mut runner = Runner::<B> {
            case,
            attention: load_attention(case, device),
            device: device.clone(),
            checks: &mut checks,
        };
        for test in case.json["tests"].as_array().expect("a list of tests") {
            runner.run(test);
        }
    }
    own_forms_ran();
    checks.finish(&format!(
        "{} cases of self-attention on {}",
        cases.len(),
        B::name(device)
    ));
}

/// The backend's own forms of the operations have run when what this returns is called. Where there is a kernel it has
/// to run from now on.
fn own_forms_run<B: AttentionBackend>(device: &B::Device) -> impl FnOnce() + use<B> {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    mtla_core::ops::cube::require_kernel(true);
    let name = B::name(device);
    let forms: &[_] = if name.contains("cubecl") {
        &[LaunchKind::CubeDecode]
    } else if name.contains("flex") {
        &[
            LaunchKind::HostAttend,
            LaunchKind::HostAttendBackward,
            LaunchKind::HostDecode,
        ]
    } else {
        &[]
    };
    let before: Vec<u64> = forms.iter().map(|form| launches(*form)).collect();
    move || {
        for (form, before) in forms.iter().zip(before) {
            assert!(launches(*form) > before, "{form:?} has not run on {name}");
        }
    }
}

/// Runs the tests of one case.
struct Runner<'a, B: AttentionBackend> {
    case: &'a Golden,
    attention: Attention<B>,
    device: B::Device,
    checks: &'a mut Checks,
}

impl<B: AttentionBackend> Runner<'_, B> {
    fn run(&mut self, test: &Value) {
        let name = text(test, "test");
        match name.split('.').next().expect("a name") {
            "train" | "pos_batch" | "pad_right" | "pad_left" | "pad_mid" | "qshort" => {
                self.whole(name, test);
            }
            "inc" | "inc_pos_batch" => self.incremental(name, test),
            "prompt" => self.prompt(name, test),
            "reorder" => self.reorder(name, test),
            // The reference's masks over cache slots have no counterpart: rows are given by lengths.
            "prompt_kpm" => {}
            other => panic!("{}: unknown test {other}", self.case.name),
        }
    }

    fn tensor<const D: usize>(&self, name: &str) -> Tensor<B, D> {
        self.case.tensor(name, &self.device)
    }

    fn close(&mut self, what: &str, found: TensorData, expected: &[f32]) {
        let what = format!("{} {what}", self.case.name);
        self.checks.close(&what, &found, expected, OUTPUT, 0.0);
    }

    fn equals_tensor(&mut self, what: &str, found: TensorData, golden: &str) {
        let case = self.case;
        self.close(what, found, case.values(golden));
    }

    fn positions(&self, test: &Value, fallback: &str) -> Vec<Vec<usize>> {
        let name = test["position"].as_str().unwrap_or(fallback);
        self.case.integers(name.split('[').next().expect("a name"))
    }

    /// `forward` on whole sequences, in both forms.
    fn whole(&mut self, name: &str, test: &Value) {
        for wants_weights in [false, true] {
            self.forward(name, test, wants_weights);
        }
        if let Some(padding) = test["key_padding_mask"].as_str() {
            let queries = self.tensor::<3>(text(test, "output")).dims()[1];
            self.padded_rows_equal_rows_alone(name, padding, queries);
        }
    }

    /// Output, gradients and, if they are wanted, weights: those who want them or bring a mask get the plain form. A
    /// causal mask is left out where it can be: it says what holds anyway.
    fn forward(&mut self, name: &str, test: &Value, wants_weights: bool) {
        let case = self.case;
        let device = self.device.clone();
        let mut attention = load_attention::<Autodiff<B>>(case, &device);
        let x = case.tensor::<Autodiff<B>, 3>("x", &device).require_grad();
        let expected = case.tensor::<B, 3>(text(test, "output"), &device);
        let (queries, tokens) = (expected.dims()[1], x.dims()[1]);
        let query = x.clone().narrow(1, tokens - queries, queries);
        let mut input = AttentionInput::new(query).with_positions(self.positions(test, "position"));
        if queries < tokens {
            input = input.with_keys(x.clone());
        }
        let mask = test["self_attn_mask"].as_str();
        if let Some(mask) = mask.filter(|mask| wants_weights || !mask.starts_with("mask.causal.")) {
            let mask: Tensor<Autodiff<B>, 2> = case.tensor(mask, &device);
            input = input.with_mask(mask.unsqueeze());
        }
        let padding = test["key_padding_mask"].as_str();
        if let Some(mask) = padding {
            input = input.with_key_padding_mask(case.mask(mask, &device));
        }
        if wants_weights {
            input = input.with_weights();
        }
        let _alone = one_graph();
        let out = attention.forward(input);

        let keep = padding.map(|mask| self.valid_queries(mask, queries));
        let valid = |x: Tensor<B, 3>| match &keep {
            Some(keep) => pick(x, keep),
            None => x.flatten(0, 1),
        };
        let golden: Vec<f32> = valid(expected).into_data().iter::<f32>().collect();
        self.close(
            name,
            valid(out.context.clone().inner()).into_data(),
            &golden,
        );
        let weights = format!("{name}.attn_weights");
        if wants_weights && case.has(&weights) {
            let mut found = out.weights.expect("asked for").inner();
            if case.json["tensors"][&weights]["doc"] == "[B,Tq,H,Tk]" {
                found = found.swap_dims(1, 2);
            }
            self.equals_tensor(&weights, found.into_data(), &weights);
        }
        let cotangent = format!("{name}.cotangent");
        if case.has(&cotangent) {
            let cotangent: Tensor<Autodiff<B>, 3> = case.tensor(&cotangent, &device);
            let grads = (out.context * cotangent).sum().backward();
            self.gradients(name, &mut attention, &grads, &[("x", &x)]);
        }
    }

    /// Numbers (among all query rows of the batch) of the queries that are not padded.
    fn valid_queries(&self, mask: &str, queries: usize) -> Vec<usize> {
        let padded = self.case.integers(mask);
        let tokens = padded[0].len();
        let flags = padded.iter().flat_map(|row| &row[tokens - queries..]);
        flags
            .enumerate()
            .filter(|(_, padded)| **padded == 0)
            .map(|(i, _)| i)
            .collect()
    }

    /// The valid tokens of each row, left-aligned and given by lengths, against each row on its own.
    fn padded_rows_equal_rows_alone(&mut self, name: &str, mask: &str, queries: usize) {
        let x = self.tensor::<3>("x");
        let [_, tokens, _] = x.dims();
        let rows: Vec<(Tensor<B, 3>, usize)> = self
            .case
            .integers(mask)
            .iter()
            .enumerate()
            .map(|(row, padded)| {
                let valid: Vec<usize> = (0..tokens).filter(|i| padded[*i] == 0).collect();
                let own = valid.iter().filter(|i| **i >= tokens - queries).count();
                let keys = x
                    .clone()
                    .narrow(0, row, 1)
                    .select(1, ints(&valid, &self.device));
                (keys, own)
            })
            .collect();
        let alone: Vec<Tensor<B, 3>> = rows
            .iter()
            .map(|(keys, own)| {
                let n = keys.dims()[1];
                let input = AttentionInput::new(keys.clone().narrow(1, n - own, *own))
                    .with_keys(keys.clone());
                self.attention.forward(input).context
            })
            .collect();

        let longest = rows
            .iter()
            .map(|(keys, _)| keys.dims()[1])
            .max()
            .expect("rows");
        let most = rows.iter().map(|(_, own)| *own).max().expect("rows");
        let keys = rows
            .iter()
            .map(|(keys, _)| pad(keys.clone(), longest))
            .collect();
        let query = rows
            .iter()
            .map(|(keys, own)| pad(keys.clone().narrow(1, keys.dims()[1] - own, *own), most))
            .collect();
        let input = AttentionInput::new(Tensor::cat(query, 0))
            .with_keys(Tensor::cat(keys, 0))
            .with_offsets(
                rows.iter()
                    .map(|(keys, own)| keys.dims()[1] - own)
                    .collect(),
            )
            .with_lengths(rows.iter().map(|(_, own)| *own).collect());
        let batch = self.attention.forward(input).context;
        for (row, alone) in alone.into_iter().enumerate() {
            let found = batch
                .clone()
                .narrow(0, row, 1)
                .narrow(1, 0, alone.dims()[1]);
            let alone: Vec<f32> = alone.into_data().iter::<f32>().collect();
            self.close(
                &format!("{name} by lengths, row {row}"),
                found.into_data(),
                &alone,
            );
        }
    }

    /// Steps on `x[:, from..]`, one output `[rows, tokens, d_model]`.
    fn steps(
        &self,
        x: &Tensor<B, 3>,
        from: usize,
        positions: &[Vec<usize>],
        cache: &mut Cache<B>,
    ) -> Tensor<B, 3> {
        let [rows, tokens, _] = x.dims();
        let all: Vec<usize> = (0..rows).collect();
        let outputs = (from..tokens)
            .map(|t| {
                let at: Vec<usize> = all
                    .iter()
                    .map(|b| positions[b % positions.len()][t])
                    .collect();
                let plan = cache.step(&all).with_positions(&at);
                let token = x.clone().narrow(1, t, 1).squeeze_dim(1);
                let y = self.attention.step(token, &plan, cache.layer_mut(0));
                y.unsqueeze_dim(1)
            })
            .collect();
        Tensor::cat(outputs, 1)
    }

    fn cache(&self, rows: usize) -> Cache<B> {
        let mut cache = Cache::new(self.attention.cache_spec(), 1, &self.device);
        cache.join(rows);
        cache
    }

    fn incremental(&mut self, name: &str, test: &Value) {
        let x = self.tensor::<3>("x");
        let mut cache = self.cache(x.dims()[0]);
        let positions = match name {
            "inc_pos_batch" => self.case.integers("pos_batch.position"),
            _ => self.positions(test, "position"),
        };
        let y = self.steps(&x, 0, &positions, &mut cache).into_data();
        let whole = if name == "inc" {
            "train.y"
        } else {
            "pos_batch.y"
        };
        let case = self.case;
        if test["reference_bug"].is_string() {
            self.equals_tensor(&format!("{name} (as training)"), y, whole);
            self.golden_differs(name, case.values(&format!("{name}.y")), case.values(whole));
            return;
        }
        self.equals_tensor(name, y, text(test, "output"));
        self.compare_cache(&format!("{name}.cache"), &cache);
    }

    /// The recorded numbers of a documented mistake really are different.
    fn golden_differs(&mut self, what: &str, golden: &[f32], right: &[f32]) {
        let error = golden
            .iter()
            .zip(right)
            .fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        let what = format!(
            "{} {what}: the recording has the reference's mistake",
            self.case.name
        );
        self.checks.holds(&what, error > 1e-3);
    }

    /// Compares all recorded states `prefix.*`.
    fn compare_cache(&mut self, prefix: &str, cache: &Cache<B>) {
        let rows: Vec<usize> = (0..cache.rows()).collect();
        let spec = cache.spec();
        let table = cache.table(&rows);
        let slots = table.gather(cache.layer(0).slots());
        let [batch, count, _] = slots.dims();
        let part = |start, width| slots.clone().narrow(2, start, width);
        let parts = match spec.layout {
            SlotLayout::Dense { kv_heads, head_dim } => {
                let width = kv_heads * head_dim;
                let heads = |x: Tensor<B, 3>| {
                    x.reshape([batch, count, kv_heads, head_dim])
                        .swap_dims(1, 2)
                        .into_data()
                };
                vec![
                    ("prev_key", heads(part(0, width))),
                    ("prev_value", heads(part(width, width))),
                ]
            }
            SlotLayout::Latent { rank, rope_dim } => vec![
                ("prev_kv_t", part(0, rank).into_data()),
                ("prev_kv", part(0, rank).into_data()),
                ("prev_k_pe", part(rank, rope_dim).into_data()),
            ],
        };
        for (name, found) in parts {
            let golden = format!("{prefix}.{name}");
            if self.case.has(&golden) {
                self.equals_tensor(&golden, found, &golden);
            }
        }
        let steps = format!("{prefix}.infer_steps");
        if self.case.has(&steps) {
            let held: Vec<usize> = rows.iter().map(|row| cache.len(*row)).collect();
            let same = self.case.integers(&steps)[0] == held;
            self.checks
                .holds(&format!("{} {steps}: {held:?}", self.case.name), same);
        }
    }

    /// A prompt, then one token at a time.
    fn prompt(&mut self, name: &str, test: &Value) {
        let case = self.case;
        let x = self.tensor::<3>("x");
        let [rows, _, width] = x.dims();
        let prompt = test["P"].as_u64().expect("the prompt's length") as usize;
        let positions = self.positions(test, "position");
        let mut cache = self.cache(rows);
        let all: Vec<usize> = (0..rows).collect();
        let plan = cache.extend(&all, &vec![prompt; rows]).with_positions(
            &all.iter()
                .map(|b| positions[b % positions.len()][..prompt].to_vec())
                .collect::<Vec<_>>(),
        );
        let start = x.clone().narrow(1, 0, prompt);
        let is_last = name.rsplit('.').next() == Some("last");
        let y_prompt = if is_last {
            let y = self
                .attention
                .prefill_last(start, &plan, cache.layer_mut(0));
            y.unsqueeze_dim(1)
        } else {
            self.attention.prefill(start, &plan, cache.layer_mut(0))
        };
        let bug = test["reference_bug"].is_string();
        let first = if is_last { prompt - 1 } else { 0 };
        let trained = self.tensor::<3>("train.y");
        let rows_of = |from: usize, to: usize| -> Vec<f32> {
            let part = trained.clone().narrow(1, from, to - from);
            part.into_data().iter::<f32>().collect()
        };
        let [p_name, s_name] = [format!("{name}.y_prompt"), format!("{name}.y_steps")];
        let as_trained = test["differs_from_training"].is_string();
        if as_trained {
            let right = rows_of(first, prompt);
            self.close(&p_name, y_prompt.clone().into_data(), &right);
            let recorded = self.tensor::<3>(&p_name);
            let last = |x: Tensor<B, 3>| x.clone().narrow(1, x.dims()[1] - 1, 1).into_data();
            let golden: Vec<f32> = last(recorded).iter::<f32>().collect();
            self.close(&format!("{p_name}, last row"), last(y_prompt), &golden);
        } else {
            self.equals_tensor(&p_name, y_prompt.into_data(), &p_name);
        }
        self.compare_cache(&format!("{name}.cache_prompt"), &cache);
        let y_steps = self.steps(&x, prompt, &positions, &mut cache).into_data();
        assert_eq!(y_steps.shape[2], width);
        if bug {
            let right = rows_of(prompt, x.dims()[1]);
            self.close(&s_name, y_steps, &right);
            self.golden_differs(&s_name, case.values(&s_name), &right);
        } else {
            self.equals_tensor(&s_name, y_steps, &s_name);
            self.compare_cache(&format!("{name}.cache_final"), &cache);
        }
    }

    /// Steps, a reordering with repeats, more steps on other input.
    fn reorder(&mut self, name: &str, test: &Value) {
        let case = self.case;
        let (x, x2) = (self.tensor::<3>("x"), self.tensor::<3>("x2"));
        let [batch, tokens, _] = x.dims();
        let k = test["k"].as_u64().expect("the number of steps") as usize;
        let order = case.integers(text(test, "order")).concat();
        let positions = case.integers("position");
        let mut cache = self.cache(batch);
        self.steps(&x.clone().narrow(1, 0, k), 0, &positions, &mut cache);
        cache.reorder(&order);
        let bug = test["reference_bug"].is_string();
        if !bug {
            self.compare_cache(&format!("{name}.cache_after_reorder"), &cache);
        }
        let source: Vec<usize> = (0..order.len()).map(|i| i % batch).collect();
        let history = Tensor::cat(
            vec![
                x.select(0, ints(&order, &self.device)).narrow(1, 0, k),
                x2.select(0, ints(&source, &self.device))
                    .narrow(1, k, tokens - k),
            ],
            1,
        );
        let y = self.steps(&history, k, &positions, &mut cache).into_data();
        let whole = self.attention.forward(AttentionInput::new(history)).context;
        let whole: Vec<f32> = whole
            .narrow(1, k, tokens - k)
            .into_data()
            .iter::<f32>()
            .collect();
        let golden = text(test, "output");
        self.close(&format!("{name} (as forward)"), y.clone(), &whole);
        if bug {
            self.golden_differs(name, case.values(golden), &whole);
        } else {
            self.equals_tensor(name, y, golden);
            self.compare_cache(&format!("{name}.cache_final"), &cache);
        }
    }

    fn gradients(
        &mut self,
        name: &str,
        attention: &mut Attention<Autodiff<B>>,
        grads: &<Autodiff<B> as AutodiffBackend>::Gradients,
        inputs: &[(&str, &Tensor<Autodiff<B>, 3>)],
    ) {
        let case = self.case;
        let mut found = input_gradients(inputs, grads);
        attention.visit_reference(&mut |weight, access| {
            found.push((format!("w.{weight}"), gradient(access, grads)));
        });
        compare_gradients(case, name, found, self.checks);
    }
}

fn input_gradients<B: AttentionBackend>(
    inputs: &[(&str, &Tensor<Autodiff<B>, 3>)],
    grads: &<Autodiff<B> as AutodiffBackend>::Gradients,
) -> Vec<(String, Option<TensorData>)> {
    inputs
        .iter()
        .map(|(name, x)| ((*name).to_owned(), x.grad(grads).map(Tensor::into_data)))
        .collect()
}

fn gradient<B: AttentionBackend>(
    access: Access<'_, Autodiff<B>>,
    grads: &<Autodiff<B> as AutodiffBackend>::Gradients,
) -> Option<TensorData> {
    fn of<B: AttentionBackend, const D: usize>(
        param: &Param<Tensor<Autodiff<B>, D>>,
        grads: &<Autodiff<B> as AutodiffBackend>::Gradients,
    ) -> Option<Tensor<B, D>> {
        param.val().grad(grads)
    }
    match access {
        Access::Matrix(param) => of(param, grads).map(|g| g.transpose().into_data()),
        Access::Vector(param) => of(param, grads).map(Tensor::into_data),
    }
}

/// Compares every recorded gradient `test.grad.*`; those of weights without effect are not recorded or 0.
fn compare_gradients(
    case: &Golden,
    test: &str,
    found: Vec<(String, Option<TensorData>)>,
    checks: &mut Checks,
) {
    let prefix = format!("{test}.grad.");
    for golden in case.names(&prefix) {
        let name = &golden[prefix.len()..];
        let what = format!("{} {golden}", case.name);
        match found.iter().find(|(found, _)| found == name) {
            Some((_, Some(gradient))) => {
                checks.close(&what, gradient, case.values(golden), 1e-7, GRADIENT);
            }
            Some((_, None)) => checks.holds(&format!("{what}: there is a gradient"), false),
            // The bias of the latent's expansion never acts, so ours does not exist.
            None => checks.holds(
                &format!("{what}: a weight of ours, or one without effect"),
                case.values(golden).iter().all(|x| *x == 0.0),
            ),
        }
    }
}

fn cross_attention<B: AttentionBackend>(device: &B::Device) {
    let mut checks = Checks::default();
    let cases: Vec<Golden> = cases().into_iter().filter(is_cross).collect();
    for case in &cases {
        for test in case.json["tests"].as_array().expect("a list of tests") {
            if text(test, "test") == "inc_first" {
                continue; // compared for every case below
            }
            cross_forward::<B>(case, test, device, &mut checks);
        }
        cross_incremental::<B>(case, device, &mut checks);
    }
    checks.finish(&format!(
        "{} cases of cross-attention on {}",
        cases.len(),
        B::name(device)
    ));
}

fn cross_forward<B: AttentionBackend>(
    case: &Golden,
    test: &Value,
    device: &B::Device,
    checks: &mut Checks,
) {
    let name = text(test, "test");
    let mut attention = load_cross_attention::<Autodiff<B>>(case, device);
    let query = case
        .tensor::<Autodiff<B>, 3>("query", device)
        .require_grad();
    let key = case.tensor::<Autodiff<B>, 3>("key", device).require_grad();
    let mut input = CrossInput::new(query.clone(), key.clone());
    if let Some(mask) = test["key_padding_mask"].as_str() {
        input = input.with_key_padding_mask(case.mask(mask, device));
    }
    let _alone = one_graph();
    let y = attention.forward(input);
    let what = format!("{} {name}", case.name);
    if test["error"].is_string() {
        // The reference fails; its first incremental call works and shows the right numbers.
        if test["key_padding_mask"].is_null() {
            let first = y.inner().narrow(1, 0, 1).into_data();
            checks.close(&what, &first, case.values("inc.y_first"), OUTPUT, 0.0);
        } else {
            checks.holds(
                &what,
                y.inner().into_data().iter::<f32>().all(f32::is_finite),
            );
        }
        return;
    }
    let golden = case.values(text(test, "output"));
    checks.close(&what, &y.clone().inner().into_data(), golden, OUTPUT, 0.0);
    let cotangent = case.tensor::<Autodiff<B>, 3>(&format!("{name}.cotangent"), device);
    let grads = (y * cotangent).sum().backward();
    let mut found = input_gradients(&[("query", &query), ("key", &key)], &grads);
    attention.visit_reference(&mut |weight, access| {
        found.push((format!("w.{weight}"), gradient(access, &grads)));
    });
    compare_gradients(case, name, found, checks);
}

/// The source compressed once, then one query at a time: equal to the whole call in every step.
fn cross_incremental<B: AttentionBackend>(case: &Golden, device: &B::Device, checks: &mut Checks) {
    let attention: CrossAttention<B> = load_cross_attention(case, device);
    let query: Tensor<B, 3> = case.tensor("query", device);
    let key: Tensor<B, 3> = case.tensor("key", device);
    let ([rows, frames, _], queries) = (key.dims(), query.dims()[1]);
    let whole = attention.forward(CrossInput::new(query.clone(), key.clone()));
    let mut cache = Cache::new(attention.cache_spec(), 1, device);
    cache.join(rows);
    let all: Vec<usize> = (0..rows).collect();
    // In two pieces, the second of which starts inside a chunk where there is one.
    let first = frames / 2;
    for (start, count) in [(0, first), (first, frames - first)] {
        let plan = cache.extend(&all, &vec![count; rows]);
        attention.prefill_source(
            key.clone().narrow(1, start, count),
            &plan,
            cache.layer_mut(0),
        );
    }
    let table = cache.table(&all);
    for t in 0..queries {
        let x = query.clone().narrow(1, t, 1).squeeze_dim(1);
        let y = attention.step(x, &table, cache.layer(0)).into_data();
        let expected: Vec<f32> = whole
            .clone()
            .narrow(1, t, 1)
            .into_data()
            .iter::<f32>()
            .collect();
        let what = format!("{} step {t}", case.name);
        checks.close(&what, &y, &expected, OUTPUT, 0.0);
        if t == 0 && case.has("inc.y_first") {
            checks.close(&what, &y, case.values("inc.y_first"), OUTPUT, 0.0);
        }
    }
    if case.has("inc.cache_first.prev_kv_t") {
        let slots = table.gather(cache.layer(0).slots()).into_data();
        let what = format!("{} compressed source", case.name);
        checks.close(
            &what,
            &slots,
            case.values("inc.cache_first.prev_kv_t"),
            OUTPUT,
            0.0,
        );
    }
}

fn text<'a>(test: &'a Value, field: &str) -> &'a str {
    test[field]
        .as_str()
        .unwrap_or_else(|| panic!("{field} is missing in {test}"))
}

fn ints<B: AttentionBackend>(values: &[usize], device: &B::Device) -> Tensor<B, 1, Int> {
    let values: Vec<i64> = values.iter().map(|x| *x as i64).collect();
    let length = values.len();
    Tensor::from_data(TensorData::new(values, [length]), device)
}

/// Fills a row up with numbers that would be seen if they had any influence.
fn pad<B: AttentionBackend>(x: Tensor<B, 3>, length: usize) -> Tensor<B, 3> {
    let [rows, tokens, width] = x.dims();
    if tokens == length {
        return x;
    }
    let junk = Tensor::full([rows, length - tokens, width], 7.5, &x.device());
    Tensor::cat(vec![x, junk], 1)
}

/// Rows of `x [batch, queries, width]` by their number among `batch · queries`.
fn pick<B: AttentionBackend>(x: Tensor<B, 3>, rows: &[usize]) -> Tensor<B, 2> {
    let [batch, queries, width] = x.dims();
    let rows = ints(rows, &x.device());
    x.reshape([batch * queries, width]).select(0, rows)
}
