//! sarai
fn main() {}
