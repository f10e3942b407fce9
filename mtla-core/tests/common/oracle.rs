//! Attention written down from its definition: nested loops in 64 bits, one row at a time, every pair of
//! tokens visited. It shares no code with the crate and knows nothing of padding, caches or chunk columns.
//!
//! ```text
//! visible(i, j)  ⇔  (j ≤ i and (j + 1) mod s = 0)  or  j = i          (s = 1: j ≤ i)
//! w_j = sigmoid( fc_c(PE(j div s)) · fc_p(c_j) )      S_i = Σ w_j c_j over the tokens j ≤ i of i's chunk
//! score(i, j) = ( q_nope_i · W_UK S_j + q_pe_i · k_j ) · (n + r)^-½
//! y_i = W_o concat_h( Σ_j softmax_j(score) W_UV S_j )
//! ```

/// One row: a vector per token.
pub(crate) type Tokens = Vec<Vec<f64>>;

/// `y = x W + b`, `weight[in][out]`.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) weight: Tokens,
    pub(crate) bias: Option<Vec<f64>>,
}

impl Linear {
    fn apply(&self, x: &[f64]) -> Vec<f64> {
        assert_eq!(x.len(), self.weight.len());
        let outputs = self.weight[0].len();
        let mut y = self.bias.clone().unwrap_or_else(|| vec![0.0; outputs]);
        for (x, weights) in x.iter().zip(&self.weight) {
            for (y, w) in y.iter_mut().zip(weights) {
                *y += x * w;
            }
        }
        y
    }
}

/// Layer norm with ε = 1e-5.
#[derive(Debug)]
pub(crate) struct Norm {
    pub(crate) gamma: Vec<f64>,
    pub(crate) beta: Vec<f64>,
}

impl Norm {
    fn apply(&self, x: &[f64]) -> Vec<f64> {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let deviation = (variance + 1e-5).sqrt();
        (0..x.len())
            .map(|i| (x[i] - mean) / deviation * self.gamma[i] + self.beta[i])
            .collect()
    }
}

/// The query projection.
#[derive(Debug)]
pub(crate) enum Query {
    Full(Linear),
    LowRank { a: Linear, norm: Norm, b: Linear },
}

impl Query {
    fn apply(&self, x: &[f64]) -> Vec<f64> {
        match self {
            Self::Full(linear) => linear.apply(x),
            Self::LowRank { a, norm, b } => b.apply(&norm.apply(&a.apply(x))),
        }
    }
}

/// Rotary embedding.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rope {
    pub(crate) theta: f64,
    pub(crate) half_split: bool,
}

impl Rope {
    fn apply(self, x: &[f64], position: usize) -> Vec<f64> {
        let half = x.len() / 2;
        let mut y = vec![0.0; x.len()];
        for i in 0..half {
            let angle = position as f64 / self.theta.powf(2.0 * i as f64 / x.len() as f64);
            let (a, b) = if self.half_split {
                (i, i + half)
            } else {
                (2 * i, 2 * i + 1)
            };
            y[a] = x[a] * angle.cos() - x[b] * angle.sin();
            y[b] = x[a] * angle.sin() + x[b] * angle.cos();
        }
        y
    }
}

/// The hyper-network of the temporal gate.
#[derive(Debug)]
pub(crate) struct Gate {
    pub(crate) fc_c: Linear,
    pub(crate) fc_p: Linear,
}

impl Gate {
    fn weight(&self, latent: &[f64], chunk: usize) -> f64 {
        let width = latent.len();
        let mut code = vec![0.0; width];
        for (column, code) in code.iter_mut().enumerate() {
            let pair = (column - column % 2) as f64;
            let angle = chunk as f64 / 10_000f64.powf(pair / width as f64);
            *code = if column % 2 == 0 {
                angle.sin()
            } else {
                angle.cos()
            };
        }
        1.0 / (1.0 + (-dot(&self.fc_c.apply(&code), &self.fc_p.apply(latent))).exp())
    }
}

/// MHA, MQA, GQA.
#[derive(Debug)]
pub(crate) struct Dense {
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) v: Linear,
    pub(crate) out: Linear,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) width: usize,
    pub(crate) rope: Rope,
}

/// MLA, MTLA and, without rope, the cross-attention.
#[derive(Debug)]
pub(crate) struct Latent {
    pub(crate) query: Query,
    pub(crate) kv_a: Linear,
    pub(crate) norm: Norm,
    /// `[rank][heads · (nope + value)]`.
    pub(crate) kv_b: Tokens,
    pub(crate) out: Linear,
    pub(crate) gate: Option<Gate>,
    pub(crate) heads: usize,
    pub(crate) nope: usize,
    pub(crate) rope_dim: usize,
    pub(crate) value: usize,
    pub(crate) stride: usize,
    pub(crate) rope: Rope,
}

/// A self-attention layer.
#[derive(Debug)]
pub(crate) enum Oracle {
    Dense(Box<Dense>),
    Latent(Box<Latent>),
}

/// What one row is asked.
pub(crate) struct Question<'a> {
    pub(crate) keys: &'a [Vec<f64>],
    pub(crate) queries: &'a [Vec<f64>],
    /// Query `i` is key token `offset + i`.
    pub(crate) offset: usize,
    /// Rotary positions of the key tokens.
    pub(crate) positions: Vec<usize>,
    /// Added to the score of (query, key token).
    pub(crate) bias: &'a dyn Fn(usize, usize) -> f64,
    /// Multiplied with the weight of (head, query, key token) after the softmax.
    pub(crate) dropout: &'a dyn Fn(usize, usize, usize) -> f64,
}

impl<'a> Question<'a> {
    pub(crate) fn new(keys: &'a [Vec<f64>], queries: &'a [Vec<f64>], offset: usize) -> Self {
        Self {
            keys,
            queries,
            offset,
            positions: (0..keys.len()).collect(),
            bias: &|_, _| 0.0,
            dropout: &|_, _, _| 1.0,
        }
    }
}

/// Outputs by query and weights (before dropout) by head, query and key token.
pub(crate) struct Answer {
    pub(crate) outputs: Tokens,
    pub(crate) weights: Vec<Tokens>,
}

impl Oracle {
    /// The outputs of a whole row that attends to itself.
    pub(crate) fn row(&self, x: &[Vec<f64>]) -> Tokens {
        self.answer(&Question::new(x, x, 0)).outputs
    }

    pub(crate) fn answer(&self, question: &Question) -> Answer {
        match self {
            Self::Dense(dense) => dense.answer(question),
            Self::Latent(latent) => latent.answer(question),
        }
    }
}

/// Whether token `i` attends to token `j`.
pub(crate) fn visible(i: usize, j: usize, stride: usize) -> bool {
    (j <= i && (j + 1).is_multiple_of(stride)) || j == i
}

impl Dense {
    fn answer(&self, question: &Question) -> Answer {
        let (w, group) = (self.width, self.heads / self.kv_heads);
        let head = |x: &[f64], h: usize| x[h * w..(h + 1) * w].to_vec();
        let at = &question.positions;
        let q = each(question.queries, self.heads, |i, x, h| {
            self.rope
                .apply(&head(&self.q.apply(x), h), at[question.offset + i])
        });
        let k = each(question.keys, self.heads, |j, x, h| {
            self.rope.apply(&head(&self.k.apply(x), h / group), at[j])
        });
        let v = each(question.keys, self.heads, |_, x, h| {
            head(&self.v.apply(x), h / group)
        });
        let sees = |i, j| visible(question.offset + i, j, 1);
        mix(&q, &k, &v, &self.out, question, sees)
    }
}

impl Latent {
    fn answer(&self, question: &Question) -> Answer {
        let at = &question.positions;
        let rank = self.norm.gamma.len();
        let projected: Tokens = question.keys.iter().map(|x| self.kv_a.apply(x)).collect();
        let latents: Tokens = projected
            .iter()
            .map(|x| self.norm.apply(&x[..rank]))
            .collect();
        let states: Tokens = (0..latents.len())
            .map(|i| self.state(&latents, i))
            .collect();
        let width = self.nope + self.rope_dim;
        let q = each(question.queries, self.heads, |i, x, h| {
            let q = &self.query.apply(x)[h * width..(h + 1) * width];
            let position = at[question.offset + i];
            [&q[..self.nope], &self.rope.apply(&q[self.nope..], position)].concat()
        });
        let k = each(&states, self.heads, |j, state, h| {
            let rope = self.rope.apply(&projected[j][rank..], at[j]);
            [self.expand(state, h, 0, self.nope), rope].concat()
        });
        let v = each(&states, self.heads, |_, state, h| {
            self.expand(state, h, self.nope, self.value)
        });
        let sees = |i, j| visible(question.offset + i, j, self.stride);
        mix(&q, &k, &v, &self.out, question, sees)
    }

    /// Cross-attention: every query sees every slot of the source; `bias(query, slot)` is added.
    pub(crate) fn cross(
        &self,
        source: &[Vec<f64>],
        queries: &[Vec<f64>],
        bias: &dyn Fn(usize, usize) -> f64,
    ) -> Tokens {
        let project = |x: &Vec<f64>| self.norm.apply(&self.kv_a.apply(x));
        let latents: Tokens = source.iter().map(project).collect();
        let last = |slot: usize| ((slot + 1) * self.stride).min(latents.len()) - 1;
        let slots = latents.len().div_ceil(self.stride);
        let states: Tokens = (0..slots)
            .map(|slot| self.state(&latents, last(slot)))
            .collect();
        let q = each(queries, self.heads, |_, x, h| {
            self.query.apply(x)[h * self.nope..(h + 1) * self.nope].to_vec()
        });
        let k = each(&states, self.heads, |_, x, h| {
            self.expand(x, h, 0, self.nope)
        });
        let v = each(&states, self.heads, |_, x, h| {
            self.expand(x, h, self.nope, self.value)
        });
        let question = Question {
            bias,
            ..Question::new(&states, queries, 0)
        };
        mix(&q, &k, &v, &self.out, &question, |_, _| true).outputs
    }

    /// `S_i`.
    fn state(&self, latents: &[Vec<f64>], i: usize) -> Vec<f64> {
        let Some(gate) = &self.gate else {
            return latents[i].clone();
        };
        let chunk = i / self.stride;
        let mut state = vec![0.0; latents[i].len()];
        for latent in &latents[chunk * self.stride..=i] {
            let w = gate.weight(latent, chunk);
            for (s, c) in state.iter_mut().zip(latent) {
                *s += w * c;
            }
        }
        state
    }

    /// `from..from + count` of the columns of head `h`.
    fn expand(&self, state: &[f64], h: usize, from: usize, count: usize) -> Vec<f64> {
        let first = h * (self.nope + self.value) + from;
        (first..first + count)
            .map(|column| {
                let column = self.kv_b.iter().map(|weights| weights[column]);
                state.iter().zip(column).map(|(s, w)| s * w).sum()
            })
            .collect()
    }
}

/// `f(token, x, head)` for every head and token, `[head][token]`.
fn each(x: &[Vec<f64>], heads: usize, f: impl Fn(usize, &[f64], usize) -> Vec<f64>) -> Vec<Tokens> {
    let token = |h: usize| x.iter().enumerate().map(|(i, x)| f(i, x, h)).collect();
    (0..heads).map(token).collect()
}

fn mix(
    q: &[Tokens],
    k: &[Tokens],
    v: &[Tokens],
    out: &Linear,
    question: &Question,
    sees: impl Fn(usize, usize) -> bool,
) -> Answer {
    let (queries, keys) = (question.queries.len(), question.keys.len());
    let mut weights = vec![vec![vec![0.0; keys]; queries]; q.len()];
    let mut outputs = Vec::new();
    for i in 0..queries {
        let mut joined = Vec::new();
        for h in 0..q.len() {
            let scale = (q[h][i].len() as f64).powf(-0.5);
            let seen: Vec<usize> = (0..keys).filter(|j| sees(i, *j)).collect();
            let scores: Vec<f64> = seen
                .iter()
                .map(|j| dot(&q[h][i], &k[h][*j]) * scale + (question.bias)(i, *j))
                .collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
            let mut sum = vec![0.0; v[h][0].len()];
            for (j, score) in seen.iter().zip(&scores) {
                let weight = (score - largest).exp() / total;
                weights[h][i][*j] = weight;
                let kept = weight * (question.dropout)(h, i, *j);
                for (sum, v) in sum.iter_mut().zip(&v[h][*j]) {
                    *sum += kept * v;
                }
            }
            joined.extend(sum);
        }
        outputs.push(out.apply(&joined));
    }
    Answer { outputs, weights }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
