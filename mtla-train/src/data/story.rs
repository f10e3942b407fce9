//! Short stories from a small, consistent world: the text that a language model learns from where the
//! user brings none.
//!
//! Two or three people walk between a few places; things lie about, are picked up, carried, given
//! away, lost and found. A true state of the world is simulated while the story is told, so that
//! every sentence is consistent with all those before it, and each story ends with questions whose
//! answers follow from its text:
//!
//! ```text
//! One cold morning Mia was in the kitchen. Tom was in the garden. There was a lamp in the garden.
//! Mia went to the garden and took the lamp. Then Tom left the garden and walked to the attic.
//! Where is the lamp? In the garden.
//! Who has the lamp? Mia.
//! ```
//!
//! The words are few (about 80), so a small model is fluent within minutes, and what is left to
//! learn is the state: who holds what, and where. That takes a memory, since the sentence that
//! settles an answer may stand anywhere in the story. A model of the last few words alone can spell,
//! but it cannot answer; the questions measure exactly this difference.
//!
//! A story is a pure function of the world's seed and the story's index, so any part of the endless
//! sequence can be made again, alone, on any platform.

mod events;
mod teller;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::{fmt::Write, ops::Range};
use teller::Teller;

/// An endless sequence of stories, each made from the world's seed and its own index.
///
/// # Example
///
/// ```
/// use mtla_train::data::story::StoryWorld;
///
/// let world = StoryWorld::new(7);
/// let story = world.story(0);
/// let asked = &story.questions[0];
/// // The sentence that settles the answer names it.
/// assert!(story.text[asked.evidence.clone()].contains(&asked.key));
/// // What a model has read when it comes to answer the first question:
/// assert!(story.prompt(0).ends_with(&asked.question));
/// assert_eq!(world.stories().next(), Some(story));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoryWorld {
    seed: u64,
}

impl StoryWorld {
    /// A world whose stories are decided by `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The story with number `index`. Equal seeds and indices give equal stories on every platform.
    pub fn story(self, index: u64) -> Story {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(index);
        Teller::new(rng).tell()
    }

    /// All stories in order of their index; it does not end.
    pub fn stories(self) -> impl Iterator<Item = Story> {
        (0..).map(move |index| self.story(index))
    }
}

/// A story and the questions that its text answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Story {
    /// Eight to fourteen sentences in ASCII, separated by single spaces.
    pub text: String,
    /// Four to six different questions, in the order in which they are asked.
    pub questions: Vec<Question>,
}

/// A question about how things stand at the end of a [`Story`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The question, such as `Where is the lamp?`.
    pub question: String,
    /// Its answer, such as `In the kitchen.` or `Mia.`.
    pub answer: String,
    /// The one word of the answer that has to be known, such as `kitchen`.
    pub key: String,
    /// The bytes of the story's text that hold the last sentence to tell the key: of the place of what
    /// is asked about, or of the person who has it; or of who that is.
    pub evidence: Range<usize>,
    /// How many facts have to be joined: 1 where the evidence says where a thing or a person is, or
    /// who has it, and 2 where it says so only of the person who has the thing.
    pub hops: usize,
}

impl Story {
    /// The whole document: the text, then one line for each question with its answer.
    pub fn render(&self) -> String {
        self.questions
            .iter()
            .fold(self.text.clone(), |mut document, asked| {
                let Question {
                    question, answer, ..
                } = asked;
                write!(document, "\n{question} {answer}").expect("a String grows");
                document
            })
    }

    /// The beginning of [`Self::render`] up to and including question `index`; what follows there is
    /// a space and the answer.
    ///
    /// # Panics
    ///
    /// If the story has no question `index`.
    pub fn prompt(&self, index: usize) -> String {
        let (text, questions) = (self.text.clone(), self.questions[..index].to_vec());
        format!(
            "{}\n{}",
            Self { text, questions }.render(),
            self.questions[index].question
        )
    }
}

impl Question {
    /// The answer of a reader who understands nothing and names the place, or the person, that was named last
    /// in what stands before the answer: a floor for every other reader.
    pub fn guess(&self, prompt: &str) -> String {
        let (before, names) = if self.question.starts_with("Who") {
            ("", teller::PEOPLE.as_slice())
        } else {
            ("In the ", teller::PLACES.as_slice())
        };
        let last = names.iter().max_by_key(|name| prompt.rfind(**name));
        format!("{before}{}.", last.unwrap_or(&names[0]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{HashMap, HashSet};

    /// A reader who knows the state of the world from the sentences alone.
    #[derive(Default)]
    struct Reader<'a> {
        places: HashMap<&'a str, &'a str>,
        holders: HashMap<&'a str, &'a str>,
    }

    impl<'a> Reader<'a> {
        /// Takes a sentence in. A person or thing must be where, and with whom, it is said to be.
        #[expect(
            clippy::too_many_lines,
            reason = "one line or two for each kind of sentence"
        )]
        fn read(&mut self, sentence: &'a str) {
            let mut words: Vec<&str> = sentence.split(' ').collect();
            match words[..] {
                ["One", _, _, ..] => drop(words.drain(..3)),
                ["Later" | "Soon" | "Then", ..] => drop(words.remove(0)),
                _ => {}
            }
            words.retain(|&word| word != "the");
            match words[..] {
                ["There", "was" | "lay", "a", thing, "in", place] => self.put(thing, place),
                [who, "had", "a", thing] => self.get(who, thing),
                [who, "was", "in", place] => self.go(who, place),
                [
                    who,
                    "left",
                    here,
                    "and",
                    "went" | "ran" | "walked",
                    "to",
                    place,
                ] => {
                    assert_eq!(self.places[who], here, "{sentence}");
                    self.go(who, place);
                }
                [
                    a,
                    "and",
                    b,
                    "left",
                    here,
                    "and",
                    "went" | "walked",
                    "to",
                    place,
                ] => {
                    assert_eq!([self.places[a], self.places[b]], [here, here], "{sentence}");
                    self.go(a, place);
                    self.go(b, place);
                }
                [who, "went", "to", place, "and", "took", thing] => {
                    self.go(who, place);
                    self.take(who, thing);
                }
                [who, "went", "to", place, "and", "left", thing, "there"] => {
                    self.go(who, place);
                    self.drop(who, thing);
                }
                [who, "went", "to", place, "and", "gave", whom, thing] => {
                    self.go(who, place);
                    self.give(who, whom, thing);
                }
                [who, "carried" | "took", thing, "from", here, "to", place] => {
                    assert_eq!(self.holders[thing], who, "{sentence}");
                    assert_eq!(self.places[who], here, "{sentence}");
                    self.go(who, place);
                }
                [who, "picked", "up", thing, "in", place]
                | [who, "found" | "took", thing, "in", place] => {
                    assert_eq!(self.places[thing], place, "{sentence}");
                    self.go(who, place);
                    self.take(who, thing);
                }
                [who, "left" | "lost", thing, "in", place] => {
                    assert_eq!(self.place(who), place, "{sentence}");
                    self.drop(who, thing);
                }
                [who, "gave" | "handed", whom, thing, "in", place] => {
                    assert_eq!(self.place(who), place, "{sentence}");
                    self.give(who, whom, thing);
                }
                [who, "still", "had", thing] => assert_eq!(self.holders[thing], who, "{sentence}"),
                ["The", what, "was", "still", "in", place]
                | [what, "was", "still", "in", place] => {
                    assert_eq!(self.place(what), place, "{sentence}");
                }
                _ => panic!("not understood: {sentence}"),
            }
        }

        fn place(&self, what: &str) -> &'a str {
            self.places[self.holders.get(what).copied().unwrap_or(what)]
        }

        fn go(&mut self, who: &'a str, place: &'a str) {
            self.places.insert(who, place);
        }

        fn put(&mut self, thing: &'a str, place: &'a str) {
            self.places.insert(thing, place);
        }

        fn get(&mut self, who: &'a str, thing: &'a str) {
            self.holders.insert(thing, who);
        }

        fn take(&mut self, who: &'a str, thing: &'a str) {
            assert!(!self.holders.contains_key(thing), "{thing} is held");
            assert_eq!(self.place(thing), self.place(who), "{who} takes {thing}");
            self.get(who, thing);
        }

        fn drop(&mut self, who: &'a str, thing: &'a str) {
            assert_eq!(self.holders.remove(thing), Some(who), "{thing} is dropped");
            self.put(thing, self.places[who]);
        }

        fn give(&mut self, who: &'a str, whom: &'a str, thing: &'a str) {
            assert_eq!(self.holders[thing], who, "{thing} is given");
            assert_eq!(self.place(who), self.place(whom), "{who} gives to {whom}");
            self.get(whom, thing);
        }

        fn answer(&self, question: &str) -> Option<(&'a str, String)> {
            let words: Vec<&str> = question.trim_end_matches('?').split(' ').collect();
            match words[..] {
                ["Where", "is", "the", what] => {
                    let place = self.place(what);
                    Some((place, format!("In the {place}.")))
                }
                ["Where", "is", who] => {
                    let place = self.place(who);
                    Some((place, format!("In the {place}.")))
                }
                ["Who", "has", "the", what] => {
                    let who = *self.holders.get(what)?;
                    Some((who, format!("{who}.")))
                }
                _ => None,
            }
        }
    }

    fn read(text: &str) -> Reader<'_> {
        let mut reader = Reader::default();
        text.trim_end_matches('.')
            .split(". ")
            .for_each(|sentence| reader.read(sentence));
        reader
    }

    fn sample() -> impl Iterator<Item = Story> {
        StoryWorld::new(3).stories().take(2000)
    }

    #[test]
    fn a_reader_of_the_text_finds_it_consistent_and_gives_the_same_answers() {
        for story in sample() {
            let reader = read(&story.text);
            for asked in &story.questions {
                let (key, answer) = reader.answer(&asked.question).expect("it can be answered");
                assert_eq!(
                    (key, &answer),
                    (asked.key.as_str(), &asked.answer),
                    "{}",
                    story.text
                );
            }
        }
    }

    #[test]
    fn evidence_is_a_sentence_that_names_the_key_and_settles_the_answer() {
        for story in sample() {
            for asked in &story.questions {
                let evidence = &story.text[asked.evidence.clone()];
                assert!(evidence.ends_with('.') && !evidence[..evidence.len() - 1].contains('.'));
                assert!(evidence.contains(&asked.key), "{evidence}: {asked:?}");
                let subject = asked
                    .question
                    .trim_end_matches('?')
                    .rsplit(' ')
                    .next()
                    .unwrap();
                if asked.hops == 1 {
                    // It speaks of what is asked about, and what stands after it is not needed.
                    assert!(evidence.contains(subject), "{evidence}: {asked:?}");
                    let known = read(&story.text[..asked.evidence.end]).answer(&asked.question);
                    assert_eq!(known.expect("it is told").0, asked.key, "{}", story.text);
                } else {
                    assert_eq!(asked.hops, 2);
                    assert!(asked.question.starts_with("Where is the "), "{asked:?}");
                }
            }
        }
    }

    #[test]
    fn stories_depend_on_seed_and_index_alone() {
        let world = StoryWorld::new(11);
        let told: Vec<Story> = world.stories().take(20).collect();
        assert_eq!(told[13], world.story(13));
        assert_eq!(
            told,
            StoryWorld::new(11).stories().take(20).collect::<Vec<_>>()
        );
        assert_ne!(told[0], StoryWorld::new(12).story(0));
    }

    #[test]
    fn stories_stay_what_they_were() {
        // What was trained on one machine is evaluated on another.
        let expected = "One windy evening Finn was in the market. Ben was in the market. Tom was in \
            the market. There was a bell in the tower. There was a ball in the cave. Ben had a map. \
            Then Finn picked up the bell in the tower. Ben left the map in the market. Finn left the \
            tower and went to the attic. Ben and Tom left the market and walked to the tower. Soon Finn \
            went to the cave and left the bell there.\n\
            Where is the ball? In the cave.\n\
            Where is the bell? In the cave.\n\
            Where is the map? In the market.\n\
            Where is Finn? In the cave.\n\
            Where is Ben? In the tower.";
        assert_eq!(StoryWorld::new(1).story(0).render(), expected);
    }

    #[test]
    fn stories_are_varied_and_of_the_promised_form() {
        let mut texts = HashSet::new();
        let mut questions = HashMap::<(String, usize), usize>::new();
        for story in sample() {
            assert!(story.render().is_ascii());
            assert!(
                (7..=13).contains(&story.text.matches('.').count()),
                "{}",
                story.text
            );
            assert!(
                (4..=6).contains(&story.questions.len()),
                "{}",
                story.render()
            );
            let asked: HashSet<_> = story.questions.iter().map(|q| &q.question).collect();
            assert_eq!(asked.len(), story.questions.len());
            for asked in &story.questions {
                let kind = asked.question.split(' ').next().unwrap().to_owned();
                *questions.entry((kind, asked.hops)).or_default() += 1;
            }
            assert!(texts.insert(story.text), "a story is told twice");
        }
        for (kind, hops) in [("Where", 1), ("Where", 2), ("Who", 1)] {
            assert!(questions[&(kind.to_owned(), hops)] > 500, "{questions:?}");
        }
    }

    #[test]
    fn guesses_name_what_was_named_last() {
        let story = StoryWorld::new(1).story(0);
        let guess = |index: usize| story.questions[index].guess(&story.prompt(index));
        assert_eq!(guess(0), "In the cave.");
        assert_eq!(guess(3), "In the market.");
        let who = Question {
            question: "Who has the map?".into(),
            ..story.questions[0].clone()
        };
        assert_eq!(who.guess(&story.prompt(0)), "Finn.");
    }

    #[test]
    fn prompts_begin_the_document() {
        let story = StoryWorld::new(1).story(0);
        let document = story.render();
        for (index, asked) in story.questions.iter().enumerate() {
            let prompt = story.prompt(index);
            let rest = document.strip_prefix(&prompt).expect("a beginning");
            assert!(rest.starts_with(&format!(" {}", asked.answer)), "{rest}");
        }
        assert_eq!(document.lines().count(), 1 + story.questions.len());
    }
}
