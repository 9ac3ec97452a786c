//! Tests that wait for most of their time, for hosts and deadlines: `make test` runs them in a process of their own, beside those that compute.

mod drill;
mod dry_run;
mod hosts;
mod process;
mod refusals;
mod remote;
mod resuming;
mod sharing;
