//! The real binary on real models and real hosts, from outside. One program for all, since each would link llama.cpp anew;
//! `cargo test --release --test end_to_end plan::` runs one file of it.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod across;
mod cache;
mod checks;
mod cli;
mod clients;
mod cores;
mod deterministic;
mod draft;
mod drill;
mod embed;
mod failures;
mod hosts;
mod lanes;
mod limits;
mod local;
mod memory;
mod peers;
mod plan;
mod pressure;
mod process;
mod proxied;
mod reasoning;
mod refusals;
mod remote;
mod resuming;
mod senses;
mod several;
mod sharing;
mod support;
mod tools;
mod waiting;
