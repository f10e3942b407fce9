//! Numbers that say how good a model is, and what to compare them with.

pub mod ngram;
