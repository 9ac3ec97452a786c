//! Every metric's name, and the text that Prometheus reads.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use sarai_core::Bytes;
use sarai_plan::EngineId;
use sarai_plan::ledger::DECISIONS_MADE;

use crate::admission::Admission;
use crate::health::{Known, State};
use crate::pool::Snapshot;

/// What the text is.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    models: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Decision {
    what: String,
}

type PerEngine = Family<Labels, Gauge<u64, AtomicU64>>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Place {
    deployment: String,
}

/// Writes the pool and the hosts (`model@place`, and what is known of it) as metrics.
pub fn render(
    snapshot: &Snapshot,
    name: impl Fn(EngineId) -> String,
    hosts: &[(String, Known)],
    admission: &Admission,
) -> String {
    let mut registry = Registry::with_prefix("sarai");
    let mut requests = |name: &str, help: &str, count: usize| {
        let gauge: Gauge<u64, AtomicU64> = Gauge::default();
        gauge.set(count as u64);
        registry.register(name, help, gauge);
    };
    requests("requests_in_flight", "Requests that are answered now", admission.in_flight());
    requests("requests_queued", "Requests that wait for a permit", admission.queued());
    let mut total = |name: &str, help: &str, bytes: Bytes| {
        let gauge: Gauge<u64, AtomicU64> = Gauge::default();
        gauge.set(bytes.0);
        registry.register_with_unit(name, help, Unit::Bytes, gauge);
    };
    total("memory_budget", "What everything together may hold", snapshot.limits.budget);
    total("memory_claimed", "What is booked", snapshot.claimed);
    total("memory_free", "What no claim holds", snapshot.limits.budget.less(snapshot.claimed));
    total("memory_server", "What the server itself holds", snapshot.server);
    total("memory_available", "What the machine can still give", snapshot.pressure.available);
    let mut engine = |name: &str, help: &str, unit: Option<Unit>| {
        let family = PerEngine::default();
        match unit {
            Some(unit) => registry.register_with_unit(name, help, unit, family.clone()),
            None => registry.register(name, help, family.clone()),
        }
        family
    };
    let planned = engine("model_memory_planned", "What was planned for a worker", Some(Unit::Bytes));
    let claimed = engine("model_memory_claimed", "What is booked for a worker", Some(Unit::Bytes));
    let anonymous = engine("model_memory_anonymous", "What only the worker has", Some(Unit::Bytes));
    let file = engine("model_memory_file", "Its share of file pages", Some(Unit::Bytes));
    let busy = engine("model_busy", "Leases that are out", None);
    let waiting = engine("model_waiting", "Requests that wait for it", None);
    for row in &snapshot.rows {
        let labels = Labels { models: name(row.engine) };
        for (family, value) in [
            (&planned, row.planned.0),
            (&claimed, row.claimed.0),
            (&anonymous, row.measured.anonymous.0),
            (&file, row.measured.file.0),
            (&busy, row.busy as u64),
            (&waiting, row.waiting as u64),
        ] {
            family.get_or_create(&labels).set(value);
        }
    }
    let open = Family::<Place, Gauge<u64, AtomicU64>>::default();
    let outstanding = Family::<Place, Gauge<u64, AtomicU64>>::default();
    for (deployment, known) in hosts {
        let place = Place { deployment: deployment.clone() };
        open.get_or_create(&place).set(u64::from(known.state != State::Closed));
        outstanding.get_or_create(&place).set(known.outstanding as u64);
    }
    registry.register("breaker_open", "1 while a host's deployment is left alone", open);
    registry.register("host_outstanding", "Requests that the host answers for us", outstanding);
    let decisions = Family::<Decision, Counter>::default();
    for (what, count) in DECISIONS_MADE.iter().zip(snapshot.counts) {
        decisions.get_or_create(&Decision { what: (*what).to_owned() }).inc_by(count);
    }
    registry.register("decisions", "What the ledger decided", decisions);
    let kills = Counter::<u64>::default();
    kills.inc_by(snapshot.oom_kills);
    registry.register("oom_kills", "Workers that the kernel killed for want of memory", kills);
    let pressure: Gauge<u64, AtomicU64> = Gauge::default();
    pressure.set(u64::from(snapshot.is_pressed));
    registry.register("memory_pressure", "1 while the kernel says that memory is short", pressure);
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = encode(&mut text, &registry);
    text
}
