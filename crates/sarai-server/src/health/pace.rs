//! How fast a deployment usually is, phase by phase: learned from whole answers, and the source of deadlines and scores.
//! Pure.

use std::time::Duration;

use sarai_core::{Timings, Usage};
use serde::{Deserialize, Serialize};

/// Gaps that must have been seen before their length is relied on.
const GAPS_TO_LEARN: u32 = 32;
/// Answers that must have been seen before the time to their first token is relied on.
const ANSWERS_TO_LEARN: u32 = 8;
/// A gap is too long at so many times the longest usual one, and not before the shortest limit.
const GAP_FACTOR: u32 = 12;
const SHORTEST_GAP_LIMIT: Duration = Duration::from_secs(4);
/// Nor before this one, where only the answer under way is known.
const SHORTEST_AT_FIRST: Duration = Duration::from_secs(10);
/// And so many times what it was, after an answer that was cut for it.
const LONGER: u32 = 2;
/// A first token is too late at so many times what is usual, and not before the shortest limit: other clients of the host
/// may be before us.
const FIRST_FACTOR: u32 = 6;
const SHORTEST_FIRST_LIMIT: Duration = Duration::from_secs(20);
/// After so many times what is usual, somebody else is asked as well.
const LATE_FACTOR: u32 = 2;
const SHORTEST_LATE: Duration = Duration::from_secs(2);
/// When somebody else is asked as well while nothing is known yet.
const LATE_UNKNOWN: Duration = Duration::from_secs(10);
/// And at most, where the host was given up before.
const LATEST_UNKNOWN: Duration = Duration::from_secs(60);
/// A slow host takes so long for a token of a prompt.
const SLOW_TOKEN: Duration = Duration::from_millis(50);
/// A host says that it loaded for a few milliseconds with every answer; this is a real load.
const A_LOAD: Duration = Duration::from_millis(700);
/// Shorter prompts tell nothing of the speed.
const TOKENS_TO_LEARN: u32 = 48;
/// What one more answer does to a mean.
const NEW: f64 = 0.2;
/// How much of a longest time is left after one more that was shorter.
const FADES: f64 = 0.99;
/// A prompt that is read so many times as fast as usual was mostly read before; what is left then.
const KEPT_IS_FASTER: f64 = 2.0;
const FADES_SLOWLY: f64 = 0.999;

/// How long the pauses between pieces of an answer usually are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gaps {
    seen: u32,
    /// The longest one; each further gap lets it fade by a hundredth.
    longest: Duration,
}

impl Gaps {
    /// Takes one more into account.
    pub fn saw(&mut self, gap: Duration) {
        self.seen = self.seen.saturating_add(1);
        self.longest = gap.max(self.longest.mul_f64(FADES));
    }

    /// Takes those of a whole stream into account.
    fn absorb(&mut self, other: Self) {
        let faded = self.longest.mul_f64(FADES.powi(i32::try_from(other.seen.min(10_000)).unwrap_or(0)));
        *self = Self { seen: self.seen.saturating_add(other.seen), longest: faded.max(other.longest) };
    }
}

/// One whole answer.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Pauses between its pieces.
    pub gaps: Gaps,
    /// From the request to the first token.
    pub first: Duration,
    /// From the first token to the end.
    pub rest: Duration,
    /// Tokens.
    pub usage: Usage,
    /// What the host says of its time; zero where it says nothing.
    pub timings: Timings,
    /// Whether some of it came only once it was whole, as calls of tools do: its pauses say nothing of others.
    pub is_held_back: bool,
}

/// What was learned of one deployment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pace {
    gaps: Gaps,
    answers: u32,
    /// Seconds per token of a prompt, the longest usual ones.
    prefill: f64,
    /// Whether that was learned of a short prompt.
    is_rough: bool,
    /// Mean seconds per token of an answer.
    decode: f64,
    /// Seconds to the first token beyond load and prefill, the longest usual ones.
    wait: f64,
    /// Seconds of a load, the longest usual ones.
    load: f64,
    /// After so many seconds without a first token it was given up, since it last answered.
    gave_up: f64,
    /// After so many seconds without a further one it was, since it last came to an end.
    cut_after: f64,
}

impl Pace {
    /// Takes an answer into account.
    pub fn saw(&mut self, sample: &Sample) {
        let Sample { first, rest, usage, timings, is_held_back, .. } = *sample;
        if !is_held_back {
            self.gaps.absorb(sample.gaps);
        }
        let load = if timings.load >= A_LOAD { timings.load } else { Duration::ZERO };
        let working = first.saturating_sub(load);
        let prefill = if timings.prefill.is_zero() { working } else { timings.prefill.min(working) };
        if !load.is_zero() {
            self.load = longest(self.load, load.as_secs_f64());
        }
        let computed = usage.prompt_tokens.saturating_sub(usage.cached_tokens);
        let is_told = !timings.prefill.is_zero();
        let (is_short, is_rough) = (computed < TOKENS_TO_LEARN, self.is_rough || self.prefill == 0.0);
        if computed > 0 && (!is_short || is_rough) && (is_told || !is_held_back) {
            let each = prefill.as_secs_f64() / f64::from(computed);
            // Ollama does not say what it has kept of an earlier prompt: then it is fast, and nothing is to be learned of that.
            let is_kept = is_told && usage.cached_tokens == 0 && each < self.prefill / KEPT_IS_FASTER;
            self.prefill = match (is_short, is_rough) {
                // Most of what a short one takes is not for its tokens.
                (true, _) if self.prefill > 0.0 => self.prefill.min(each),
                (true, _) | (false, true) => each,
                (false, false) if is_kept => self.prefill * FADES_SLOWLY,
                (false, false) => longest(self.prefill, each),
            };
            self.is_rough = is_short;
        }
        let rest = if is_held_back { timings.decode } else { rest };
        if usage.completion_tokens > 1 && !rest.is_zero() {
            let each = rest.as_secs_f64() / f64::from(usage.completion_tokens - 1);
            self.decode = if self.decode == 0.0 { each } else { self.decode + NEW * (each - self.decode) };
        }
        if !is_held_back {
            let beyond = working.as_secs_f64() - self.prefill * f64::from(usage.prompt_tokens);
            self.wait = longest(self.wait, beyond.max(0.0));
        }
        self.answers = self.answers.saturating_add(1);
        self.cut_after = 0.0;
        if self.is_known() {
            self.gave_up = 0.0;
        }
    }

    /// A stream was cut for a gap of this length: the limit may have been too short.
    pub fn cut_for_gap(&mut self, gap: Duration) {
        self.cut_after = self.cut_after.max(gap.as_secs_f64());
    }

    /// An answer was given up before its first token after so long: it may have been too early.
    pub fn gave_up(&mut self, after: Duration) {
        self.gave_up = self.gave_up.max(after.as_secs_f64());
    }

    /// How long a gap may be, within the configured limit: by what is usual there, and in this answer so far.
    #[must_use]
    pub fn gap_limit(&self, now: Gaps, configured: Duration) -> Duration {
        if self.gaps.seen.saturating_add(now.seen) < GAPS_TO_LEARN {
            return configured;
        }
        let usual = self.gaps.longest.max(now.longest) * GAP_FACTOR;
        let longer = Duration::from_secs_f64(self.cut_after) * LONGER;
        let shortest = if self.gaps.seen < GAPS_TO_LEARN { SHORTEST_AT_FIRST } else { SHORTEST_GAP_LIMIT };
        usual.max(longer).max(shortest).min(configured)
    }

    /// How long nothing at all may come before the first token, within the configured limit.
    #[must_use]
    pub fn first_limit(&self, expected: Expected, configured: Duration) -> Duration {
        // A load that was never seen may take anything.
        let is_known = self.answers >= ANSWERS_TO_LEARN && (expected.is_resident || self.load > 0.0);
        match is_known {
            true => {
                let usual = self.usual(expected).max(Duration::from_secs_f64(self.gave_up)) + self.held_back(expected);
                (usual * FIRST_FACTOR).max(SHORTEST_FIRST_LIMIT).min(configured)
            }
            false => configured,
        }
    }

    /// When the first token is so late that somebody else is asked as well.
    #[must_use]
    pub fn late(&self, expected: Expected) -> Duration {
        let is_known = self.is_known() && (expected.is_resident || self.load > 0.0);
        let gave_up = Duration::from_secs_f64(self.gave_up);
        let late = match is_known {
            // A host that has become slower is given longer each time, and has its turn again.
            true => (self.usual(expected).max(gave_up.min(LATE_UNKNOWN)) * LATE_FACTOR).max(SHORTEST_LATE),
            false => (gave_up * LATE_FACTOR).clamp(LATE_UNKNOWN, latest_unknown(expected)),
        };
        late + self.held_back(expected)
    }

    /// How long what may be held back takes to be written.
    fn held_back(&self, expected: Expected) -> Duration {
        Duration::try_from_secs_f64(self.decode * f64::from(expected.held_tokens)).unwrap_or_default()
    }

    /// Whether it is known what is late here.
    #[must_use]
    pub const fn is_known(&self) -> bool {
        self.answers >= ANSWERS_TO_LEARN / 2
    }

    /// Whether a host of which nothing is known, and which is there, may just be slow: it was not given long yet.
    #[must_use]
    pub fn may_be_slow(&self, expected: Expected, late: Duration) -> bool {
        !self.is_known() && late.as_secs() < latest_unknown(expected).as_secs()
    }

    /// What an answer takes, so that hosts can be compared; `None` while nothing is known.
    #[must_use]
    pub fn service(&self, expected: Expected) -> Option<Duration> {
        let decode = Duration::from_secs_f64(self.decode * f64::from(expected.answer_tokens));
        (self.answers > 0).then(|| self.usual(expected) + decode)
    }

    fn usual(&self, expected: Expected) -> Duration {
        let load = if expected.is_resident { 0.0 } else { self.load };
        let seconds = self.wait + self.prefill * f64::from(expected.prompt_tokens) + load;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 64)
    }
}

/// What is expected of a deployment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Tokens of the prompt, estimated.
    pub prompt_tokens: u32,
    /// Tokens of the answer, at most.
    pub answer_tokens: u32,
    /// Those of them that may come only once they are whole.
    pub held_tokens: u32,
    /// Whether the model is loaded there.
    pub is_resident: bool,
}

/// How late a host may be at most of which nothing is known.
fn latest_unknown(expected: Expected) -> Duration {
    (LATE_UNKNOWN + SLOW_TOKEN * expected.prompt_tokens).min(LATEST_UNKNOWN)
}

fn longest(known: f64, new: f64) -> f64 {
    new.max(known * FADES)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn answer(first_ms: u64, prompt_tokens: u32) -> Sample {
        Sample {
            gaps: Gaps::default(),
            first: Duration::from_millis(first_ms),
            rest: Duration::from_secs(1),
            usage: Usage { prompt_tokens, cached_tokens: 0, completion_tokens: 11 },
            timings: Timings::default(),
            is_held_back: false,
        }
    }

    fn expected(prompt_tokens: u32, is_resident: bool) -> Expected {
        Expected { prompt_tokens, answer_tokens: 100, held_tokens: 0, is_resident }
    }

    fn with_gaps(pace: &mut Pace, gaps: impl IntoIterator<Item = u64>) {
        let mut seen = Gaps::default();
        gaps.into_iter().for_each(|ms| seen.saw(Duration::from_millis(ms)));
        pace.gaps.absorb(seen);
    }

    #[test]
    fn the_limit_of_a_gap_is_learned_and_never_beyond_the_configured_one() {
        let mut pace = Pace::default();
        let limit = |pace: &Pace| pace.gap_limit(Gaps::default(), MINUTE);
        assert_eq!(limit(&pace), MINUTE, "nothing is known yet");
        let mut now = Gaps::default();
        (0..40).for_each(|_| now.saw(Duration::from_millis(50)));
        assert_eq!(pace.gap_limit(now, MINUTE), SHORTEST_AT_FIRST, "but of this answer");
        now.saw(Duration::from_secs(2));
        assert_eq!(pace.gap_limit(now, MINUTE), Duration::from_secs(24));
        with_gaps(&mut pace, std::iter::repeat_n(50, 40));
        assert_eq!(limit(&pace), SHORTEST_GAP_LIMIT, "a host may pause for other clients");
        with_gaps(&mut pace, [2_000]);
        assert_eq!(limit(&pace), Duration::from_secs(24));
        with_gaps(&mut pace, std::iter::repeat_n(50, 500));
        assert_eq!(limit(&pace), SHORTEST_GAP_LIMIT, "and forgotten");
    }

    #[test]
    fn a_stall_that_was_noticed_makes_the_next_limit_twice_as_long_until_an_answer_ends() {
        let mut pace = Pace::default();
        with_gaps(&mut pace, std::iter::repeat_n(50, 40));
        for wanted in [4, 8, 16, 32, 60, 60] {
            let limit = pace.gap_limit(Gaps::default(), MINUTE);
            assert_eq!(limit.as_secs(), wanted);
            pace.cut_for_gap(limit);
        }
        pace.saw(&answer(100, 100));
        assert_eq!(pace.gap_limit(Gaps::default(), MINUTE), SHORTEST_GAP_LIMIT);
    }

    #[test]
    fn a_long_prompt_and_a_cold_model_are_given_their_time() {
        let mut pace = Pace::default();
        let hour = MINUTE * 60;
        assert_eq!(pace.first_limit(expected(10, true), hour), hour, "nothing is known yet");
        assert_eq!(pace.late(expected(10, true)), LATE_UNKNOWN);
        for _ in 0..10 {
            pace.saw(&answer(1_000, 100));
        }
        assert_eq!(pace.first_limit(expected(100, true), hour), SHORTEST_FIRST_LIMIT);
        assert_eq!(pace.late(expected(100, true)), SHORTEST_LATE);
        assert_eq!(pace.first_limit(expected(10_000, true), hour).as_secs(), 600, "10 ms a token, six times over");
        assert_eq!(pace.late(expected(10_000, true)).as_secs(), 200);
        assert_eq!(pace.first_limit(expected(100, false), hour), hour, "no load was seen yet");
        let load = Timings { load: Duration::from_secs(90), ..Timings::default() };
        pace.saw(&Sample { first: Duration::from_secs(91), timings: load, ..answer(0, 100) });
        assert_eq!(pace.first_limit(expected(100, false), hour).as_secs(), 546);
        assert!(pace.first_limit(expected(100, true), hour) < MINUTE, "a load is not taken for a slow prompt");
    }

    #[test]
    fn what_was_cut_for_too_short_a_limit_is_given_longer_the_next_time() {
        let mut pace = Pace::default();
        (0..10).for_each(|_| pace.saw(&answer(100, 100)));
        let before = pace.first_limit(expected(100, true), MINUTE * 60);
        pace.gave_up(before);
        assert!(pace.first_limit(expected(100, true), MINUTE * 60) > before * 2);
        let mut slower = Pace::default();
        (0..10).for_each(|_| slower.saw(&answer(100, 100)));
        for wanted in [2, 4, 8] {
            assert_eq!(slower.late(expected(100, true)).as_secs(), wanted);
            slower.gave_up(Duration::from_secs(wanted));
        }
        slower.saw(&answer(100, 100));
        assert_eq!(slower.late(expected(100, true)), SHORTEST_LATE);
    }

    #[test]
    fn a_host_of_which_nothing_is_known_is_given_longer_each_time() {
        let mut pace = Pace::default();
        for wanted in [10, 20, 40, 60, 60] {
            let late = pace.late(expected(1_000, true));
            assert_eq!((late.as_secs(), pace.may_be_slow(expected(1_000, true), late)), (wanted, wanted < 60));
            pace.gave_up(late);
        }
        assert_eq!(pace.late(expected(100, true)).as_secs(), 15, "a short prompt takes nobody so long");
        (0..4).for_each(|_| pace.saw(&answer(40_000, 1_000)));
        assert_eq!(pace.late(expected(1_000, true)).as_secs(), 80, "and then it is known");
    }

    #[test]
    fn prompts_that_were_read_before_do_not_make_others_late() {
        let mut pace = Pace::default();
        let of_host = |prefill: u64| {
            let timings = Timings { prefill: Duration::from_millis(prefill), ..Timings::default() };
            Sample { timings, ..answer(prefill, 1_000) }
        };
        (0..10).for_each(|_| pace.saw(&of_host(10_000)));
        let before = pace.late(expected(8_000, true));
        (0..300).for_each(|_| pace.saw(&of_host(200)));
        assert!(pace.late(expected(8_000, true)) > before.mul_f64(0.7));
        (0..300).for_each(|_| pace.saw(&of_host(6_000)));
        assert!(pace.late(expected(8_000, true)) < before.mul_f64(0.7), "and one that became faster is");
    }

    #[test]
    fn what_a_short_prompt_seems_to_take_is_forgotten_with_the_first_long_one() {
        let mut pace = Pace::default();
        pace.saw(&answer(30_000, 20));
        pace.saw(&answer(1_000, 1_000));
        (0..6).for_each(|_| pace.saw(&answer(1_000, 1_000)));
        assert!(pace.prefill < 0.002, "{}", pace.prefill);
    }

    #[test]
    fn calls_that_come_whole_teach_nothing_and_are_given_their_time() {
        let mut pace = Pace::default();
        (0..10).for_each(|_| pace.saw(&answer(100, 100)));
        let usual = pace.late(expected(100, true));
        let called = Sample { is_held_back: true, ..answer(60_000, 100) };
        (0..10).for_each(|_| pace.saw(&called));
        assert_eq!(pace.late(expected(100, true)), usual);
        assert!(pace.first_limit(expected(100, true), MINUTE * 60) < MINUTE);
        // A tenth of a second a token.
        let may_call = Expected { held_tokens: 100, ..expected(100, true) };
        assert_eq!(pace.late(may_call), usual + Duration::from_secs(10));
    }

    #[test]
    fn the_faster_host_takes_less_for_the_same_answer() {
        let (mut fast, mut slow) = (Pace::default(), Pace::default());
        assert_eq!(fast.service(expected(100, true)), None);
        fast.saw(&answer(100, 100));
        slow.saw(&answer(1_000, 100));
        assert!(fast.service(expected(100, true)) < slow.service(expected(100, true)));
    }
}
