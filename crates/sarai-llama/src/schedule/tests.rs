//! Random workloads on a fake context, which holds every sequence to the tokens that it says it has.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use llama_cpp_4::token::LlamaToken;
use proptest::prelude::*;

use super::places::DEAR;
use super::*;
use crate::cells::{Parked, Wanted};

/// A cell: what it holds, its position, when it was computed, and the sequences that use it.
type Cell = (Unit, usize, usize, HashSet<usize>);

/// A pool of cells.
struct Pool {
    cells: Vec<Option<Cell>>,
    computed: usize,
    /// Whether a state stands for all tokens of a sequence: it cannot be cut.
    is_state: bool,
    /// Tokens that a sliding window covers; 0 if there is none.
    window: usize,
    /// The last position that was computed of each sequence, whatever was cut since.
    reached: HashMap<usize, usize>,
    /// What is kept elsewhere, and whether it can be brought back.
    kept: Option<Vec<Unit>>,
    is_refused: bool,
}

impl Pool {
    fn new(cells: usize) -> Self {
        Self {
            cells: vec![None; cells],
            computed: 0,
            is_state: false,
            window: 0,
            reached: HashMap::new(),
            kept: None,
            is_refused: false,
        }
    }

    fn used(&self) -> usize {
        self.cells.iter().flatten().count()
    }

    fn drop_unused(&mut self) {
        for cell in &mut self.cells {
            cell.take_if(|(_, _, _, sequences)| sequences.is_empty());
        }
    }

    /// What a sequence holds, in order; a position that is there twice or not at all is a mistake.
    fn units(&self, sequence: usize) -> Vec<Unit> {
        let mut own: Vec<_> = self.cells.iter().flatten().filter(|cell| cell.3.contains(&sequence)).collect();
        own.sort_by_key(|cell| (cell.1, cell.2));
        let units: Vec<_> = own.iter().map(|cell| cell.0).collect();
        for (at, cell) in own.iter().enumerate() {
            let begins = match cell.0 {
                Unit::Text(_) => at,
                Unit::Media { index, .. } => at - index as usize,
            };
            assert_eq!(
                cell.1,
                positions(&units[..begins]),
                "sequence {sequence} has holes or doubles at {at}: {units:?}"
            );
        }
        units
    }

    /// Computes a step, or says that there is no room for it.
    fn decode(&mut self, step: &Step) -> bool {
        if self.cells.len() - self.used() < step.rows.len() {
            return false;
        }
        for row in &step.rows {
            let free = self.cells.iter_mut().find(|cell| cell.is_none()).unwrap();
            *free = Some((row.unit, row.position, self.computed, HashSet::from([row.sequence])));
            self.computed += 1;
            let reached = self.reached.entry(row.sequence).or_default();
            *reached = row.position.max(*reached);
        }
        true
    }
}

impl Cells for Pool {
    fn share(&mut self, from: usize, to: usize, positions: Range<usize>) {
        for (_, position, _, sequences) in self.cells.iter_mut().flatten() {
            if sequences.contains(&from) && positions.contains(position) {
                sequences.insert(to);
            }
        }
    }

    fn cut(&mut self, sequence: usize, keep: usize) -> bool {
        let is_beyond = |cell: &&Cell| cell.3.contains(&sequence) && cell.1 >= keep;
        let is_cut = self.cells.iter().flatten().any(|cell| is_beyond(&cell));
        if keep > 0 && self.is_state && is_cut {
            self.cut(sequence, 0);
            return false;
        }
        assert!(
            keep == 0 || self.holds(sequence, keep),
            "sequence {sequence} is cut at {keep}, which its window has passed"
        );
        if keep == 0 {
            self.reached.remove(&sequence);
        }
        for (_, position, _, sequences) in self.cells.iter_mut().flatten() {
            if *position >= keep {
                sequences.remove(&sequence);
            }
        }
        self.drop_unused();
        true
    }

    fn holds(&self, sequence: usize, keep: usize) -> bool {
        let reached = self.reached.get(&sequence).copied().unwrap_or_default();
        self.window == 0 || keep == 0 || reached < keep + self.window
    }

    fn parked(&self, wanted: Wanted<'_>) -> Parked {
        let kept = self.kept.as_deref().unwrap_or_default();
        Parked { shared: common(kept, wanted.prompt), held: kept.len() }
    }

    fn restore(&mut self, sequence: usize, _: Wanted<'_>) -> Option<Vec<Unit>> {
        let units =
            self.kept.clone().filter(|units| !self.is_refused && units.len() <= self.cells.len() - self.used())?;
        for (position, unit) in units.iter().enumerate() {
            let free = self.cells.iter_mut().find(|cell| cell.is_none()).unwrap();
            *free = Some((*unit, position, 0, HashSet::from([sequence])));
        }
        self.kept = None;
        Some(units)
    }

    fn discard(&mut self, _: Wanted<'_>) {
        self.kept = None;
    }
}

/// What the fake model says next: a function of all that came before, so that a wrong prefix gives another answer.
fn next_token(units: &[Unit]) -> LlamaToken {
    let number = |unit: &Unit| match unit {
        Unit::Text(token) => i64::from(token.0),
        Unit::Media { piece, index, .. } => i64::from(1000 * piece + index),
    };
    let hash = units.iter().fold(7_i64, |hash, unit| (hash * 31 + number(unit)) % 9973);
    LlamaToken(i32::try_from(hash).unwrap())
}

/// Numbers from this one on stand for pictures.
const PICTURES: i32 = 100_000;

/// Tokens, and pictures of five parts each: even ones stand at two positions and are computed as it comes, odd ones at five and at once.
fn units(numbers: &[i32]) -> Vec<Unit> {
    let part = |number: i32, index: u32| {
        let is_non_causal = number % 2 == 1;
        let advance = if is_non_causal { 1 } else { 2 * u32::from(index == 4) };
        Unit::Media { piece: u32::try_from(number).unwrap(), index, advance, is_non_causal }
    };
    let all = numbers.iter().map(|&number| match number {
        PICTURES.. => (0..5).map(|index| part(number, index)).collect(),
        _ => vec![LlamaToken(number).into()],
    });
    all.collect::<Vec<_>>().concat()
}

fn tokens(units: &[Unit]) -> Vec<i32> {
    units.iter().map(|unit| unit.text().unwrap().0).collect()
}

struct Case {
    scheduler: Scheduler<u32>,
    pool: Pool,
    ended: Vec<(u64, Vec<Unit>, usize)>,
    lane: fn(u64) -> Lane,
}

impl Case {
    fn new(parallel: usize, cells: usize, step_tokens: usize) -> Self {
        Self::sharing(Sharing::Prefixes, parallel, cells, step_tokens)
    }

    fn sharing(sharing: Sharing, parallel: usize, cells: usize, step_tokens: usize) -> Self {
        let limits = Limits { parallel, cells, step_tokens, draft_tokens: 4, sharing, seconds_per_foreign_cell: 1e-12 };
        let is_state = sharing == Sharing::Whole { may_cut: false };
        let window = if sharing == (Sharing::Whole { may_cut: true }) { 16 } else { 0 };
        Self {
            scheduler: Scheduler::new(limits),
            pool: Pool { is_state, window, ..Pool::new(cells) },
            ended: Vec::new(),
            lane: |_| Lane::Interactive,
        }
    }

    fn ask(&mut self, id: u64, prompt: &[i32], max_tokens: u32, context_tokens: usize) {
        let prompt = units(prompt);
        let since = Instant::now();
        let encode = Duration::ZERO;
        // As with pictures that were seen before, and are not kept encoded.
        let lacks = prompt.iter().filter_map(|unit| unit.piece()).filter(|piece| piece % 3 > 0).collect();
        let lane = (self.lane)(id);
        let (given, writer) = (0, max_tokens);
        self.scheduler.push(Waiting {
            id,
            prompt,
            given,
            lane,
            max_tokens,
            context_tokens,
            since,
            encode,
            lacks,
            writer,
        });
    }

    /// Has something encoded that a generation waits for; false if none does.
    fn supply(&mut self) -> bool {
        let stuck = self.scheduler.sequences.iter_mut().find(|sequence| sequence.is_stuck());
        let generation = stuck.and_then(|sequence| sequence.generation.as_mut());
        generation.map(|generation| generation.asked.lacks.clear()).is_some()
    }

    /// One step, as the engine does it; false if there was nothing to do.
    fn step(&mut self) -> bool {
        self.scheduler.begin_waiting(&mut self.pool);
        self.scheduler.give_up_dear(&mut self.pool);
        let running = self.scheduler.sequences.iter().filter(|sequence| sequence.generation.is_some()).count();
        assert!(running <= self.scheduler.limits.parallel);
        let step = self.scheduler.fill(&mut self.pool);
        assert!(step.rows.len() <= self.scheduler.limits.step_tokens);
        if step.is_non_causal {
            let has_own = self.scheduler.limits.sharing.has_own_cells();
            assert!(!has_own || step.answers == 0, "a step of several sequences is computed in parts");
            assert_eq!(step.drafted, 0, "a draft beside it would see what follows it");
            let prompts: HashSet<_> = step.rows[step.answers..].iter().map(|row| row.sequence).collect();
            assert_eq!(
                (prompts.len(), step.rows.len() - step.answers),
                (1, 5),
                "a picture that is computed at once is alone"
            );
        }
        for row in &step.rows {
            let generation = self.scheduler.sequences[row.sequence].generation.as_ref().unwrap();
            assert!(!generation.asked.lacks(Some(row.unit)), "it is not encoded");
        }
        if step.rows.is_empty() {
            assert!(self.scheduler.is_idle() || self.supply(), "something waits, and nothing is computed");
            return !self.scheduler.is_idle();
        }
        while !self.pool.decode(&step) {
            assert!(self.scheduler.evict(&mut self.pool), "what runs must have room for all that it may need");
        }
        self.scheduler.pace.observe(step.answers, step.rows.len() - step.answers, Duration::from_millis(1));
        for index in 0..self.scheduler.sequences.len() {
            let sequence = &mut self.scheduler.sequences[index];
            assert_eq!(self.pool.units(index), sequence.cached, "sequence {index}");
            let Some(generation) = sequence.generation.as_mut().filter(|one| one.output_row.is_some()) else {
                continue;
            };
            let (mut accepted, drafted) = (0, generation.drafted);
            let known = sequence.cached.len() - drafted;
            while let Some(generation) = &mut sequence.generation {
                generation.generated += 1;
                let next = next_token(&sequence.cached[..known + accepted]);
                generation.next = Some(next);
                if generation.limit(known + accepted).is_some() {
                    let generation = sequence.generation.take().unwrap();
                    self.ended.push((
                        generation.asked.id,
                        sequence.cached[..known + accepted].to_vec(),
                        generation.cached,
                    ));
                } else if accepted < drafted && sequence.cached[known + accepted] == next.into() {
                    accepted += 1;
                } else {
                    break;
                }
            }
            self.scheduler.reject(index, drafted - accepted, &mut self.pool);
            let most = self.scheduler.draft_room(index);
            let sequence = &mut self.scheduler.sequences[index];
            let Some(generation) = &mut sequence.generation else { continue };
            // Of its draft, some are right: how many changes from answer to answer and from step to step.
            let mut ahead = sequence.cached.clone();
            ahead.extend(generation.next.map(Unit::Text));
            let wrong_from = (generation.asked.id as usize + ahead.len()) % 6;
            generation.draft = (0..most)
                .map(|at| {
                    let token = if at < wrong_from { next_token(&ahead) } else { LlamaToken(9999) };
                    ahead.push(token.into());
                    token
                })
                .collect();
        }
        true
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Prompts of a few shared beginnings, with pictures in them, of which some are cancelled: every other one ends with the answer that it would
    /// have had alone, and all cells come back.
    #[test]
    fn all_end_with_the_answer_that_they_would_have_alone(
        sharing in prop::sample::select(vec![
            Sharing::Prefixes,
            Sharing::Own { may_cut: true },
            Sharing::Own { may_cut: false },
            Sharing::Whole { may_cut: true },
            Sharing::Whole { may_cut: false },
        ]),
        parallel in 1_usize..5,
        step_tokens in 10_usize..40,
        asked in prop::collection::vec((0_i32..4, 0_usize..60, 1_usize..30, 1_u32..12, 0_usize..40, any::<bool>()), 1..24),
    ) {
        let context = 150;
        let mut case = Case::sharing(sharing, parallel, context * parallel, step_tokens);
        case.lane = |id| if id % 3 == 1 { Lane::Bulk } else { Lane::Interactive };
        let mut prompts = Vec::new();
        for (id, (beginning, shared, own, most, pause, cancelled)) in asked.iter().enumerate() {
            let id = id as u64;
            let shared = (0..*shared).map(|at| match at % 11 {
                5 => PICTURES + (beginning * 100 + i32::try_from(at).unwrap()) / 3,
                _ => beginning * 100 + i32::try_from(at).unwrap(),
            });
            let own = (0..*own).map(|at| 1000 + i32::try_from(id).unwrap() * 50 + i32::try_from(at).unwrap());
            let prompt: Vec<i32> = shared.chain(own).collect();
            case.ask(id, &prompt, *most, context);
            prompts.push((prompt, *most, *cancelled));
            for _ in 0..*pause {
                case.step();
            }
            if *cancelled {
                case.scheduler.cancel(id);
            }
        }
        let mut steps = 0;
        while case.step() {
            steps += 1;
            prop_assert!(steps < 5000, "it never ends");
        }
        for (id, (prompt, most, cancelled)) in prompts.iter().enumerate() {
            let ended: Vec<_> = case.ended.iter().filter(|ended| ended.0 == id as u64).collect();
            prop_assert!(*cancelled || ended.len() == 1, "{id} ended {} times", ended.len());
            let mut alone = units(prompt);
            for _ in 1..*most {
                alone.push(next_token(&alone).into());
            }
            // The last token is chosen, and not computed.
            prop_assert!(ended.iter().all(|ended| ended.1 == alone));
        }
        while case.scheduler.evict(&mut case.pool) {}
        prop_assert_eq!(case.pool.used(), 0);
    }
}

fn numbers(from: i32, count: i32) -> Vec<i32> {
    (from..from + count).collect()
}

/// Who was used least recently gives way, and whoever was used since is still there.
#[test]
fn what_was_used_least_recently_is_given_up() {
    let mut case = Case::new(1, 256, 64);
    let told = [numbers(0, 90), numbers(1_000, 90), numbers(2_000, 90)];
    for (id, prompt) in [&told[0], &told[1], &told[0], &told[2]].into_iter().enumerate() {
        case.ask(id as u64, prompt, 1, 100);
        while case.step() {}
    }
    let cached = |case: &mut Case, id: u64, prompt: &[i32]| {
        case.ask(id, prompt, 1, 100);
        while case.step() {}
        case.ended.iter().find(|ended| ended.0 == id).unwrap().2
    };
    assert_eq!(cached(&mut case, 10, &told[0]), 89, "it was used after the second one");
    assert_eq!(cached(&mut case, 11, &told[1]), 0, "the third one has its cells");
}

/// Beyond the sequences that can be kept, too: then there are cells, and no number for them.
#[test]
fn of_more_conversations_than_can_be_numbered_the_oldest_goes() {
    let mut case = Case::new(2, 4_096, 64);
    let kept = case.scheduler.sequences.len();
    let prompt = |n: usize| numbers(i32::try_from(100 * n).unwrap(), 20);
    for n in 0..kept + 8 {
        case.ask(n as u64, &prompt(n), 1, 64);
        while case.step() {}
        // The first one is used again and again.
        case.ask(1_000 + n as u64, &prompt(0), 1, 64);
        while case.step() {}
    }
    for (id, n, is_there) in [(5_000, 0, true), (5_001, kept + 7, true), (5_002, 1, false)] {
        case.ask(id, &prompt(n), 1, 64);
        while case.step() {}
        let cached = case.ended.iter().find(|ended| ended.0 == id).unwrap().2;
        assert_eq!(cached > 15, is_there, "conversation {n}: {cached}");
    }
}

#[test]
fn what_is_kept_elsewhere_comes_back_or_is_given_up_once() {
    for is_refused in [false, true] {
        let mut case = Case::new(2, 512, 64);
        let long = numbers(5_000, 200);
        (case.pool.kept, case.pool.is_refused) = (Some(units(&long)), is_refused);
        for n in 0..3 {
            case.ask(n, &numbers(100 * i32::try_from(n).unwrap(), 100), 1, 300);
            while case.step() {}
        }
        case.ask(10, &[long.clone(), numbers(9_000, 4)].concat(), 1, 300);
        while case.step() {}
        assert_eq!(case.ended.iter().find(|ended| ended.0 == 10).unwrap().2, if is_refused { 0 } else { 200 });
        assert!(case.pool.kept.is_none(), "either way it is not there any more");
        // Nothing is given up for it a second time.
        case.ask(11, &numbers(20_000, 100), 1, 300);
        while case.step() {}
        case.ask(12, &[long.clone(), numbers(9_100, 4)].concat(), 1, 300);
        while case.step() {}
        assert_eq!(case.ended.iter().find(|ended| ended.0 == 12).unwrap().2, 200);
    }
}

#[test]
fn sixteen_sessions_that_begin_alike_compute_it_once_on_four_places_and_on_every_turn() {
    let mut case = Case::new(4, 4 * 1024, 256);
    let mut turns: Vec<Vec<i32>> = (0..16).map(|n| [numbers(0, 800), numbers(10_000 + 100 * n, 20)].concat()).collect();
    for turn in 0..3 {
        let before = case.pool.computed;
        for (id, prompt) in turns.iter().enumerate() {
            case.ask(turn * 100 + id as u64, prompt, 5, 1024);
        }
        while case.step() {}
        // Of an answer of five tokens, four are computed as its own steps.
        let own = 16 * (20 + 4);
        let unavoidable = if turn == 0 { 800 + own } else { own };
        // The token that was chosen last was not computed, and each prompt's last one is computed anew.
        let computed = case.pool.computed - before;
        assert!(computed <= unavoidable + 2 * 16, "turn {turn}: {computed} of {unavoidable}");
        for (id, prompt) in turns.iter_mut().enumerate() {
            let ended = case.ended.iter().find(|ended| ended.0 == turn * 100 + id as u64).unwrap();
            *prompt = tokens(&ended.1);
            prompt.extend(numbers(20_000 + 1000 * i32::try_from(turn).unwrap() + 50 * i32::try_from(id).unwrap(), 20));
        }
    }
}

#[test]
fn a_prompt_that_waits_for_another_one_goes_on_alone_when_that_is_cancelled() {
    let mut case = Case::new(2, 2048, 64);
    case.ask(1, &numbers(0, 500), 3, 1024);
    case.ask(2, &numbers(0, 501), 3, 1024);
    case.step();
    case.step();
    assert_eq!(case.pool.computed, 128, "the second one computes nothing of its own");
    case.scheduler.cancel(1);
    while case.step() {}
    let (id, _, cached) = case.ended[0];
    assert_eq!((case.ended.len(), id, cached), (1, 2, 128));
}

#[test]
fn a_state_that_cannot_be_cut_is_continued_and_never_shared() {
    let mut case = Case::sharing(Sharing::Whole { may_cut: false }, 2, 2048, 64);
    case.ask(1, &numbers(0, 100), 1, 1024);
    while case.step() {}
    let (_, cached, _) = case.ended.remove(0);
    let longer = [tokens(&cached), vec![5]].concat();
    case.ask(2, &longer, 1, 1024);
    case.ask(3, &longer, 1, 1024);
    while case.step() {}
    let taken_over: Vec<_> = case.ended.iter().map(|ended| (ended.0, ended.2)).collect();
    assert_eq!(taken_over, [(2, 100), (3, 0)]);
}

/// What all prompts begin with is no reason to give up another conversation.
#[test]
fn conversations_by_turns_keep_a_place_each() {
    for sharing in [Sharing::Whole { may_cut: false }, Sharing::Whole { may_cut: true }, Sharing::Own { may_cut: true }]
    {
        let mut case = Case::sharing(sharing, 2, 2048, 64);
        let begin = numbers(0, 4);
        let mut told: Vec<_> = [1000, 2000].map(|from| [&begin[..], &numbers(from, 100)].concat()).into();
        for turn in 0..4 {
            for at in 0..2 {
                case.ask(turn * 2 + at + 1, &told[at as usize], 1, 1024);
                while case.step() {}
                let (_, held, cached) = case.ended.remove(0);
                assert_eq!(cached > 100, turn > 0, "{sharing:?} {turn} {at}: {cached}");
                told[at as usize] = [tokens(&held), vec![5]].concat();
            }
        }
    }
}

#[test]
fn a_short_prompt_does_not_wait_behind_a_long_one() {
    let mut case = Case::new(2, 4096, 64);
    case.ask(1, &numbers(0, 1500), 1, 2048);
    case.step();
    case.ask(2, &numbers(5000, 30), 1, 2048);
    case.step();
    assert_eq!(case.ended.iter().map(|ended| ended.0).collect::<Vec<_>>(), [2]);
}

/// Else those behind the first one would enter beside it, in its pace.
#[test]
fn who_comes_together_begins_together_and_who_is_at_it_keeps_its_pace() {
    let mut case = Case::new(5, 4096, 256);
    for id in 0..4 {
        case.ask(id, &numbers(1000 * i32::try_from(id).unwrap(), 120), 60, 400);
    }
    case.step();
    case.step();
    let begun = |case: &Case| case.scheduler.running().filter(|one| one.generated > 0).count();
    assert_eq!(begun(&case), 4, "480 tokens are two steps");
    (0..JUST_BEGUN).for_each(|_| assert!(case.step()));
    let slow = |case: &mut Case| {
        case.scheduler.pace = Pace::default();
        case.scheduler.pace.observe(4, 0, Duration::from_millis(10));
        case.scheduler.pace.observe(0, 1, Duration::from_millis(2));
    };
    slow(&mut case);
    case.ask(4, &numbers(8000, 200), 60, 400);
    case.step();
    let left: usize = case.scheduler.sequences.iter().map(Sequence::prompt_left).sum();
    assert_eq!(left, 200 - 25, "five times what answers take");
    // Answers that have just begun are no exception beside what takes long, what came later, and what is bulk.
    let beside = |(together, later, lane): (i32, i32, fn(u64) -> Lane)| {
        let mut case = Case { lane, ..Case::new(2, 4096, 256) };
        case.scheduler.limits.draft_tokens = 0;
        case.ask(0, &numbers(0, 20), 60, 400);
        case.ask(1, &numbers(1000, together), 1, 2000);
        case.step();
        case.step();
        if later > 0 {
            case.ask(2, &numbers(2000, later), 60, 2000);
        }
        slow(&mut case);
        let left = |case: &Case| case.scheduler.sequences.iter().map(Sequence::prompt_left).sum::<usize>();
        let before = left(&case).max(usize::try_from(later).unwrap());
        case.step();
        before - left(&case)
    };
    assert_eq!(beside((700, 0, |_| Lane::Interactive)), 700 - 236 - 255, "the rest is soon computed");
    assert_eq!(beside((1700, 0, |_| Lane::Interactive)), 25);
    assert_eq!(beside((20, 200, |_| Lane::Interactive)), 25);
    assert_eq!(beside((700, 0, |_| Lane::Bulk)), 25);
}

#[test]
fn what_is_kept_is_given_up_once_passing_over_it_has_cost_a_third_of_computing_it_again() {
    let mut case = Case::new(1, 4096, 64);
    // A step of a prompt takes 1/64 ms a token here: a third of it is worth passing over a cell for a hundred tokens.
    case.scheduler.limits.seconds_per_foreign_cell = 1e-3 / 64.0 / 100.0 / DEAR;
    case.ask(1, &numbers(0, 64), 1, 1024);
    case.ask(2, &numbers(1000, 64), 1, 1024);
    while case.step() {}
    assert_eq!(case.pool.used(), 128);
    case.ask(3, &numbers(2000, 64), 1, 1024);
    case.ask(4, &numbers(1000, 65), 1, 1024);
    while case.step() {}
    case.ask(5, &numbers(3000, 64), 1, 1024);
    while case.step() {}
    let cached: Vec<_> = case.ended.iter().map(|ended| ended.2).collect();
    assert_eq!(cached, [0, 0, 0, 64, 0]);
    assert_eq!(case.pool.used(), 64 + 65 + 64, "the first one has cost its worth, the one that was used again has not");
}

#[test]
fn a_sequence_in_cells_of_its_own_is_continued_there_and_cut_only_where_it_keeps_their_order() {
    for may_cut in [true, false] {
        let mut case = Case::sharing(Sharing::Own { may_cut }, 2, 2048, 64);
        case.ask(1, &numbers(0, 100), 1, 1024);
        while case.step() {}
        let longer = [tokens(&case.ended.remove(0).1), vec![5]].concat();
        case.ask(2, &longer, 1, 1024);
        while case.step() {}
        case.ask(3, &[&longer[..90], &[7, 7]].concat(), 1, 1024);
        while case.step() {}
        let taken_over: Vec<_> = case.ended.iter().map(|ended| (ended.0, ended.2)).collect();
        assert_eq!(taken_over, [(2, 100), (3, if may_cut { 90 } else { 0 })]);
    }
}

#[test]
fn bulk_has_a_fourth_of_the_steps_beside_others_and_begins_after_them() {
    let mut case = Case::new(2, 4096, 256);
    case.lane = |id| if id < 10 { Lane::Bulk } else { Lane::Interactive };
    case.scheduler.limits.draft_tokens = 0;
    let generated = |case: &Case, id: u64| {
        let running = case.scheduler.sequences.iter().filter_map(|one| one.generation.as_ref());
        running.filter(|one| one.asked.id == id).map(|one| one.generated).sum::<u32>()
    };
    case.ask(1, &numbers(0, 20), 500, 1024);
    (0..10).for_each(|_| assert!(case.step()));
    assert_eq!(generated(&case, 1), 10, "alone, it has all steps");
    case.ask(10, &numbers(1000, 20), 40, 1024);
    // Another one of each, which wait for a place; the bulk one came first.
    case.ask(2, &numbers(2000, 20), 5, 1024);
    case.ask(11, &numbers(3000, 20), 5, 1024);
    (0..20).for_each(|_| assert!(case.step()));
    assert_eq!((generated(&case, 1), generated(&case, 10)), (15, 20));
    while case.step() {}
    let order: Vec<_> = case.ended.iter().map(|(id, ..)| *id).collect();
    assert_eq!(order, [10, 11, 2, 1]);
}

#[test]
fn bulk_that_waits_is_not_passed_without_end() {
    let mut case = Case::new(1, 4096, 256);
    case.lane = |id| if id == 0 { Lane::Bulk } else { Lane::Interactive };
    for id in 0..30 {
        case.ask(id, &numbers(100, 5), 1, 1024);
    }
    while case.step() {}
    let order: Vec<_> = case.ended.iter().map(|(id, ..)| *id).collect();
    let passed = order.iter().position(|id| *id == 0).unwrap();
    assert_eq!(passed, MOST_BEFORE_BULK);
}

#[test]
fn a_long_bulk_prompt_goes_on_beside_others() {
    let mut case = Case::new(2, 8192, 64);
    case.lane = |id| if id == 1 { Lane::Bulk } else { Lane::Interactive };
    case.ask(1, &numbers(0, 1000), 1, 2048);
    case.ask(2, &numbers(5000, 2000), 1, 4096);
    (0..20).for_each(|_| assert!(case.step()));
    let done = |case: &Case, id: u64| {
        let one = case.scheduler.sequences.iter().find(|one| one.age() == id);
        one.map_or(0, |one| one.cached.len())
    };
    // Half of the room in a fourth of the steps.
    assert_eq!((done(&case, 1), done(&case, 2)), (5 * 32, 20 * 64 - 5 * 32));
}
