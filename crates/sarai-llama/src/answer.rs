//! The text of one answer: whole characters only, and nothing of a stop text.

/// What a pushed piece of text amounts to.
#[derive(Debug, PartialEq, Eq)]
pub enum Pushed {
    /// Text that can be sent; may be empty while something is held back.
    Text(String),
    /// The text up to a stop text, which ends the answer.
    Stopped(String),
}

/// Turns the bytes of tokens into text that can be sent.
///
/// Holds back an unfinished character, and any tail that a stop text may begin with.
pub struct AnswerText {
    stops: Vec<String>,
    bytes: Vec<u8>,
    held: String,
    /// Bytes at the beginning of `held` that were sent already.
    sent: usize,
}

impl AnswerText {
    /// An empty answer that ends at any of these texts.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        Self { stops, bytes: Vec::new(), held: String::new(), sent: 0 }
    }

    /// An answer whose beginning was sent already; a stop text may begin in there.
    pub fn after(given: &str, stops: &[String]) -> Self {
        let mut answer = Self::new(stops);
        let _ = answer.push(given.as_bytes());
        answer.sent = answer.held.len();
        answer
    }

    /// Adds the bytes of one token.
    pub fn push(&mut self, piece: &[u8]) -> Pushed {
        self.bytes.extend_from_slice(piece);
        let whole = take_whole_characters(&mut self.bytes);
        self.held.push_str(&whole);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            let text = std::mem::take(&mut self.held);
            return Pushed::Stopped(self.unsent(text));
        }
        let free = self.held.len() - self.possible_stop_bytes();
        let rest = self.held.split_off(free);
        let text = std::mem::replace(&mut self.held, rest);
        Pushed::Text(self.unsent(text))
    }

    /// What of a text from the beginning of `held` was not sent yet.
    fn unsent(&mut self, mut text: String) -> String {
        let sent = self.sent.min(text.len());
        self.sent -= sent;
        text.split_off(sent)
    }

    /// Returns what was held back, at the end of an answer that no stop text ended.
    pub fn finish(mut self) -> String {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(&String::from_utf8_lossy(&self.bytes));
        self.unsent(text)
    }

    /// The length of the longest tail that is the beginning of a stop text.
    fn possible_stop_bytes(&self) -> usize {
        let begins = |tail: &str| self.stops.iter().any(|stop| stop.starts_with(tail));
        self.held.char_indices().map(|(at, _)| &self.held[at..]).find(|tail| begins(tail)).map_or(0, str::len)
    }
}

/// Takes all whole characters; bytes that can never become one are replaced, an unfinished tail stays.
fn take_whole_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut chunks = bytes.utf8_chunks().peekable();
    let mut tail: &[u8] = &[];
    while let Some(chunk) = chunks.next() {
        text.push_str(chunk.valid());
        let invalid = chunk.invalid();
        let unfinished = std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if chunks.peek().is_none() && unfinished {
            tail = invalid;
        } else if !invalid.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
    *bytes = tail.to_vec();
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stops(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn a_character_split_over_tokens_arrives_whole() {
        let mut answer = AnswerText::new(&[]);
        let llama = "🦙".as_bytes();
        assert_eq!(answer.push(&llama[..1]), Pushed::Text(String::new()));
        assert_eq!(answer.push(&llama[1..3]), Pushed::Text(String::new()));
        assert_eq!(answer.push(&llama[3..]), Pushed::Text("🦙".into()));
        assert_eq!(answer.finish(), "");
    }

    #[test]
    fn bytes_that_are_no_character_are_replaced_and_the_rest_goes_on() {
        let mut answer = AnswerText::new(&[]);
        assert_eq!(answer.push(&[b'a', 0xff, b'b']), Pushed::Text("a\u{fffd}b".into()));
    }

    #[test]
    fn a_stop_text_split_over_tokens_is_never_sent() {
        let mut answer = AnswerText::new(&stops(&["###"]));
        assert_eq!(answer.push(b"one #"), Pushed::Text("one ".into()));
        assert_eq!(answer.push(b"#"), Pushed::Text(String::new()));
        assert_eq!(answer.push(b"# two"), Pushed::Stopped(String::new()));
    }

    #[test]
    fn a_tail_that_turns_out_not_to_be_a_stop_text_is_sent() {
        let mut answer = AnswerText::new(&stops(&["STOP"]));
        assert_eq!(answer.push(b"an S"), Pushed::Text("an ".into()));
        assert_eq!(answer.push(b"TEP"), Pushed::Text("STEP".into()));
        assert_eq!(answer.push(b"ST"), Pushed::Text(String::new()));
        assert_eq!(answer.finish(), "ST");
    }

    #[test]
    fn a_stop_text_may_begin_in_what_was_sent_and_nothing_is_sent_twice() {
        let mut answer = AnswerText::after("one ST", &stops(&["STOP"]));
        assert_eq!(answer.push(b"O"), Pushed::Text(String::new()));
        assert_eq!(answer.push(b"P two"), Pushed::Stopped(String::new()));
        let mut answer = AnswerText::after("one ST", &stops(&["STOP"]));
        assert_eq!(answer.push(b"ART"), Pushed::Text("ART".into()));
        assert_eq!(AnswerText::after("one ST", &stops(&["STOP"])).finish(), "");
        assert_eq!(AnswerText::after("one", &[]).push(b" two"), Pushed::Text(" two".into()));
    }

    #[test]
    fn the_earliest_of_several_stop_texts_ends_the_answer() {
        let mut answer = AnswerText::new(&stops(&["late", "early"]));
        assert_eq!(answer.push(b"so early or late"), Pushed::Stopped("so ".into()));
    }
}
