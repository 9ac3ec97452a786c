//! `sarai drill`: what clients would see if a host failed, fault by fault.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use sarai_server::config::{self, Environment};
use sarai_server::drill::{self, Cell, Drill, Shape};

use super::serve::THIS_BINARY;
use crate::args::DrillArgs;
use crate::{Failure, command, log};

/// Plays the faults; exits with 1 if any client was lied to.
pub fn run(args: &DrillArgs) -> Result<ExitCode, Failure> {
    let config = config::load(&args.config.config, &Environment::of_process()).map_err(Failure::misused)?;
    let known: Vec<_> = drill::models(&config).map(|model| model.name.clone()).collect();
    let chosen = match &args.model {
        Some(name) => known.iter().find(|known| *known == name),
        None => known.first(),
    };
    let Some(model) = chosen.cloned() else {
        let names = if known.is_empty() { "no model has one".to_owned() } else { known.join(", ") };
        return Err(Failure::misused(anyhow::anyhow!("a drill needs a model with a remote host: {names}")));
    };
    let drill = Drill {
        first_token: Duration::from_secs_f64(args.first_token_seconds),
        gap: Duration::from_secs_f64(args.gap_seconds),
        max_tokens: args.max_tokens,
        model,
    };
    let table = Table { json: args.json };
    table.begin(&drill);
    let mut row = String::new();
    let tell = |cell: &Cell| table.cell(&mut row, cell);
    let cells = command::runtime()?.block_on(drill::run(config, &drill, PathBuf::from(THIS_BINARY), tell));
    let cells = cells.map_err(Failure::failed)?;
    let lies = cells.iter().filter(|cell| !cell.verdict.is_honest()).count();
    table.end(&cells, lies);
    Ok(if lies == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// One row per fault, one column per way of asking; or JSON, all at the end.
struct Table {
    json: bool,
}

impl Table {
    fn begin(&self, drill: &Drill) {
        if !self.json {
            let (first, gap) = (drill.first_token.as_secs_f64(), drill.gap.as_secs_f64());
            let said =
                format!("the first host of `{}` fails in every way (first token {first} s, gap {gap} s)", drill.model);
            log::print(&format!("{said}\n\n{}\n", heading()));
        }
    }

    fn cell(&self, row: &mut String, cell: &Cell) {
        if self.json {
            return;
        }
        if cell.shape == Shape::ALL[0] {
            *row = format!("{:<26}", cell.fault.name());
        }
        let text = format!("{} ({:.1} s)", cell.verdict.text(), cell.took.as_secs_f64());
        row.push_str(&format!(" {text:<52}"));
        if cell.shape == Shape::ALL[2] {
            log::print(&format!("{}\n", row.trim_end()));
        }
    }

    fn end(&self, cells: &[Cell], lies: usize) {
        if !self.json {
            log::print(&format!("\n{} cells, {lies} of them dishonest\n", cells.len()));
            return;
        }
        let cell = |cell: &Cell| {
            serde_json::json!({
                "fault": cell.fault.name(), "shape": cell.shape.name(), "verdict": cell.verdict.text(),
                "honest": cell.verdict.is_honest(), "seconds": cell.took.as_secs_f64(),
            })
        };
        let cells: Vec<_> = cells.iter().map(cell).collect();
        log::print(&format!("{:#}\n", serde_json::Value::from(cells)));
    }
}

fn heading() -> String {
    let mut heading = format!("{:<26}", "fault");
    for shape in Shape::ALL {
        heading.push_str(&format!(" {:<52}", shape.name()));
    }
    heading.trim_end().to_owned()
}
