//! The state of a story's world, how a story begins, and the questions at its end.
//!
//! Next to the state stands what the reader has been told: for each fact the last sentence that
//! settled it, which is the evidence for the answer to a question.

use super::{Question, Story, events::EVENTS};
use rand::{RngExt, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use std::ops::Range;

pub(super) const PEOPLE: [&str; 10] = [
    "Ada", "Ben", "Clara", "Finn", "Iris", "Leo", "Mia", "Nora", "Tom", "Zoe",
];
pub(super) const PLACES: [&str; 10] = [
    "attic", "barn", "cave", "cellar", "forest", "garden", "kitchen", "market", "mill", "tower",
];
const THINGS: [&str; 10] = [
    "ball", "bell", "book", "coin", "drum", "hat", "key", "lamp", "map", "ring",
];
const WEATHERS: [&str; 6] = ["bright", "cold", "foggy", "rainy", "warm", "windy"];
const TIMES: [&str; 4] = ["afternoon", "day", "evening", "morning"];
/// What leads on from one sentence to the next; mostly nothing does.
const LEADS: [&str; 8] = ["", "", "", "", "", "Later ", "Soon ", "Then "];

/// The last sentence that settled a fact, and how many facts the reader joins to learn it.
#[derive(Clone, Copy)]
pub(super) struct Told {
    pub(super) sentence: usize,
    pub(super) hops: usize,
}

pub(super) struct Person {
    pub(super) name: &'static str,
    pub(super) place: &'static str,
    pub(super) place_told: Told,
}

pub(super) struct Thing {
    pub(super) name: &'static str,
    pub(super) place: &'static str,
    pub(super) place_told: Told,
    /// Index into the people.
    pub(super) holder: Option<usize>,
    pub(super) holder_told: Told,
    pub(super) lost: bool,
}

/// Tells one story: the state of its world, and the text so far.
pub(super) struct Teller {
    pub(super) rng: ChaCha8Rng,
    places: Vec<&'static str>,
    pub(super) people: Vec<Person>,
    pub(super) things: Vec<Thing>,
    text: String,
    pub(super) sentences: Vec<Range<usize>>,
}

impl Teller {
    pub(super) fn new(mut rng: ChaCha8Rng) -> Self {
        let places = rng.random_range(3..=4);
        Self {
            places: PLACES.sample(&mut rng, places).copied().collect(),
            rng,
            people: Vec::new(),
            things: Vec::new(),
            text: String::new(),
            sentences: Vec::new(),
        }
    }

    pub(super) fn tell(mut self) -> Story {
        self.introduce_people();
        self.introduce_things();
        let end = self.sentences.len() + self.rng.random_range(3..=7);
        while self.sentences.len() < end {
            let (event, _) = *EVENTS
                .choose_weighted(&mut self.rng, |&(_, weight)| weight)
                .expect("the weights are positive");
            // What the state does not allow leaves it as it was, and something else is tried.
            let _ = event(&mut self);
        }
        let questions = self.ask();
        Story {
            text: self.text,
            questions,
        }
    }
}

/// The words.
impl Teller {
    /// Writes a sentence, and returns its number.
    pub(super) fn say(&mut self, sentence: &str) -> usize {
        if !self.text.is_empty() {
            self.text.push(' ');
        }
        let start = self.text.len();
        self.text.push_str(sentence);
        self.text.push('.');
        self.sentences.push(start..self.text.len());
        self.sentences.len() - 1
    }

    /// Writes a sentence about what happens next, and returns its number.
    pub(super) fn then(&mut self, sentence: &str) -> usize {
        let lead = self.pick(&LEADS);
        self.say(&format!("{lead}{sentence}"))
    }

    pub(super) fn pick<T: Copy>(&mut self, options: &[T]) -> T {
        *options.choose(&mut self.rng).expect("there are options")
    }
}

/// The state.
impl Teller {
    /// A sentence says that a person is at a place, and so is all that they have.
    pub(super) fn arrive(&mut self, who: usize, place: &'static str, sentence: usize) {
        let person = &mut self.people[who];
        (person.place, person.place_told) = (place, Told { sentence, hops: 1 });
        for thing in self
            .things
            .iter_mut()
            .filter(|thing| thing.holder == Some(who))
        {
            (thing.place, thing.place_told) = (place, Told { sentence, hops: 2 });
        }
    }

    /// A sentence says that somebody has a thing.
    pub(super) fn hold(&mut self, who: usize, what: usize, sentence: usize) {
        let thing = &mut self.things[what];
        (thing.holder, thing.holder_told) = (Some(who), Told { sentence, hops: 1 });
        thing.lost = false;
    }

    /// A sentence says that a thing is where it is.
    pub(super) fn locate(&mut self, what: usize, sentence: usize) {
        self.things[what].place_told = Told { sentence, hops: 1 };
    }

    pub(super) fn some_person(&mut self, fits: impl Fn(&Self, usize) -> bool) -> Option<usize> {
        let fitting: Vec<_> = (0..self.people.len())
            .filter(|&who| fits(self, who))
            .collect();
        fitting.choose(&mut self.rng).copied()
    }

    /// Somebody whom the last sentence did not bring where they are.
    pub(super) fn some_walker(&mut self) -> Option<usize> {
        let now = self.sentences.len();
        self.some_person(|teller, who| teller.people[who].place_told.sentence + 1 < now)
    }

    /// Somebody at a place other than `who`.
    pub(super) fn companion(&mut self, who: usize, place: &str) -> Option<usize> {
        self.some_person(|teller, whom| whom != who && teller.people[whom].place == place)
    }

    pub(super) fn some_thing(&mut self, fits: impl Fn(&Thing) -> bool) -> Option<usize> {
        let fitting: Vec<_> = (0..self.things.len())
            .filter(|&what| fits(&self.things[what]))
            .collect();
        fitting.choose(&mut self.rng).copied()
    }

    /// Somebody with a thing that they have not just got.
    pub(super) fn some_holder(&mut self) -> Option<(usize, usize)> {
        let now = self.sentences.len();
        let what = self.some_thing(|t| t.holder.is_some() && t.holder_told.sentence + 1 < now)?;
        Some((self.things[what].holder?, what))
    }

    pub(super) fn elsewhere(&mut self, here: &str) -> &'static str {
        let others: Vec<_> = self
            .places
            .iter()
            .copied()
            .filter(|&place| place != here)
            .collect();
        self.pick(&others)
    }
}

/// The beginning.
impl Teller {
    fn introduce_people(&mut self) {
        let count = self.rng.random_range(2..=3);
        let cast: Vec<_> = PEOPLE.sample(&mut self.rng, count).copied().collect();
        for name in cast {
            let place = self.elsewhere("");
            let opening = match self.people.len() {
                0 => format!("One {} {} ", self.pick(&WEATHERS), self.pick(&TIMES)),
                _ => String::new(),
            };
            let sentence = self.say(&format!("{opening}{name} was in the {place}"));
            let place_told = Told { sentence, hops: 1 };
            self.people.push(Person {
                name,
                place,
                place_told,
            });
        }
    }

    fn introduce_things(&mut self) {
        let count = self.rng.random_range(2..=3);
        let cast: Vec<_> = THINGS.sample(&mut self.rng, count).copied().collect();
        for name in cast {
            let owner = self.rng.random_bool(0.4);
            let holder = if owner {
                self.some_person(|_, _| true)
            } else {
                None
            };
            let (place, place_told, sentence);
            if let Some(Person {
                name: who,
                place: home,
                place_told: told,
            }) = holder.map(|who| &self.people[who])
            {
                (place, place_told) = (*home, Told { hops: 2, ..*told });
                sentence = self.say(&format!("{who} had a {name}"));
            } else {
                place = self.elsewhere("");
                let there = self.pick(&["There was a", "There lay a"]);
                sentence = self.say(&format!("{there} {name} in the {place}"));
                place_told = Told { sentence, hops: 1 };
            }
            let holder_told = Told { sentence, hops: 1 };
            self.things.push(Thing {
                name,
                place,
                place_told,
                holder,
                holder_told,
                lost: false,
            });
        }
    }
}

/// The questions.
impl Teller {
    /// Up to six different questions: much of what can be asked, so that there is much to learn it from.
    fn ask(&mut self) -> Vec<Question> {
        let count = self.rng.random_range(5..=6);
        let mut candidates = self.answerable();
        let mut questions = Vec::new();
        while questions.len() < count
            && let Ok((_, asked)) = candidates.choose_weighted(&mut self.rng, |&(weight, _)| weight)
        {
            let asked = asked.clone();
            candidates.retain(|(_, other)| other.question != asked.question);
            questions.push(asked);
        }
        questions
    }

    /// All questions that can be asked at the end of the story, with how often each is to be chosen.
    fn answerable(&self) -> Vec<(u32, Question)> {
        let mut candidates = Vec::new();
        let mut add = |weight, question, answer, key: &str, Told { sentence, hops }| {
            let (key, evidence) = (key.to_owned(), self.sentences[sentence].clone());
            candidates.push((
                weight,
                Question {
                    question,
                    answer,
                    key,
                    evidence,
                    hops,
                },
            ));
        };
        for &Thing {
            name,
            place,
            place_told,
            holder,
            holder_told,
            ..
        } in &self.things
        {
            let answer = format!("In the {place}.");
            add(
                3,
                format!("Where is the {name}?"),
                answer,
                place,
                place_told,
            );
            if let Some(who) = holder {
                let who = self.people[who].name;
                let answer = format!("{who}.");
                add(3, format!("Who has the {name}?"), answer, who, holder_told);
            }
        }
        for &Person {
            name,
            place,
            place_told,
        } in &self.people
        {
            let answer = format!("In the {place}.");
            add(2, format!("Where is {name}?"), answer, place, place_told);
        }
        candidates
    }
}
