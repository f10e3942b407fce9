#![cfg_attr(docsrs, feature(doc_cfg))]
#![doc = include_str!("../README.md")]

pub mod attention;
pub mod cache;
pub mod linear;
pub mod ops;
pub mod rope;
pub mod temporal;
#[cfg(feature = "testing")]
pub mod testing;
