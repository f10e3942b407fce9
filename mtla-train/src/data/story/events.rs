//! What may happen in a story, and the words for it.
//!
//! Each event looks for people and things that it fits, tells it, and changes the state to what the
//! sentence says. A subject stands before what is said of it: who has a thing before the thing, and a
//! thing before the place where it is, so that a reader finds the answers with few rules. And sentences say
//! again what the reader can know (where somebody comes from, where a thing changes hands): each of them is a
//! question that the story answers itself.

use super::teller::{Person, Teller, Thing, Told};
use rand::RngExt;

/// Makes something happen, or gives nothing where the state does not allow it.
pub(super) type Event = fn(&mut Teller) -> Option<()>;

/// What may happen, with how often it is tried.
pub(super) const EVENTS: [(Event, u32); 9] = [
    (Teller::walk, 8),
    (Teller::walk_together, 3),
    (Teller::errand, 8),
    (Teller::carry, 4),
    (Teller::fetch, 7),
    (Teller::take, 4),
    (Teller::leave, 6),
    (Teller::give, 6),
    (Teller::recall, 6),
];

impl Teller {
    fn walk(&mut self) -> Option<()> {
        let who = self.some_walker()?;
        let Person {
            name, place: here, ..
        } = self.people[who];
        let place = self.elsewhere(here);
        let went = self.pick(&["went", "ran", "walked"]);
        let told = self.then(&format!("{name} left the {here} and {went} to the {place}"));
        self.arrive(who, place, told);
        Some(())
    }

    fn walk_together(&mut self) -> Option<()> {
        let who = self.some_walker()?;
        let Person { name, place, .. } = self.people[who];
        let whom = self.companion(who, place)?;
        let (other, here, place) = (self.people[whom].name, place, self.elsewhere(place));
        let went = self.pick(&["went", "walked"]);
        let told = self.then(&format!(
            "{name} and {other} left the {here} and {went} to the {place}"
        ));
        self.arrive(who, place, told);
        self.arrive(whom, place, told);
        Some(())
    }

    /// Somebody goes somewhere to give something away, to take something, or to leave it there.
    fn errand(&mut self) -> Option<()> {
        let who = self.some_walker()?;
        let Person { name, place, .. } = self.people[who];
        let place = self.elsewhere(place);
        let own = self.some_thing(|t| t.holder == Some(who));
        let (what, deed, holder) = if let Some(what) = own {
            let thing = self.things[what].name;
            match self.companion(who, place) {
                Some(whom) => (
                    what,
                    format!("gave {} the {thing}", self.people[whom].name),
                    Some(whom),
                ),
                None => (what, format!("left the {thing} there"), None),
            }
        } else {
            let what = self.some_thing(|t| t.holder.is_none() && t.place == place && !t.lost)?;
            (
                what,
                format!("took the {}", self.things[what].name),
                Some(who),
            )
        };
        let told = self.then(&format!("{name} went to the {place} and {deed}"));
        self.hold(who, what, told);
        self.arrive(who, place, told);
        match holder {
            Some(holder) => self.hold(holder, what, told),
            None => self.things[what].holder = None,
        }
        Some(())
    }

    fn carry(&mut self) -> Option<()> {
        let what = self.some_thing(|t| t.holder.is_some())?;
        let who = self.things[what].holder?;
        let (Person { name, place, .. }, thing) = (&self.people[who], self.things[what].name);
        let (name, here, place) = (*name, *place, self.elsewhere(place));
        let carried = self.pick(&["carried", "took"]);
        let told = self.then(&format!(
            "{name} {carried} the {thing} from the {here} to the {place}"
        ));
        self.arrive(who, place, told);
        self.hold(who, what, told);
        self.locate(what, told);
        Some(())
    }

    /// Somebody goes where a thing is, and takes it.
    fn fetch(&mut self) -> Option<()> {
        let who = self.some_walker()?;
        let Person {
            name, place: here, ..
        } = self.people[who];
        let what = self.some_thing(|t| t.holder.is_none() && (t.lost || t.place != here))?;
        let Thing {
            name: thing,
            place,
            lost,
            ..
        } = self.things[what];
        let found = if lost { "found" } else { "picked up" };
        let told = self.then(&format!("{name} {found} the {thing} in the {place}"));
        self.hold(who, what, told);
        self.arrive(who, place, told);
        self.locate(what, told);
        Some(())
    }

    /// Somebody takes what lies where they are.
    fn take(&mut self) -> Option<()> {
        let what = self.some_thing(|t| t.holder.is_none() && !t.lost)?;
        let Thing {
            name: thing,
            place,
            place_told,
            ..
        } = self.things[what];
        let who = self.some_person(|teller, who| teller.people[who].place == place)?;
        if place_told.sentence + 1 == self.sentences.len() {
            return None;
        }
        let took = self.pick(&["picked up", "took"]);
        let name = self.people[who].name;
        let told = self.then(&format!("{name} {took} the {thing} in the {place}"));
        self.hold(who, what, told);
        self.arrive(who, place, told);
        self.locate(what, told);
        Some(())
    }

    /// Somebody leaves a thing where they are, on purpose or not.
    fn leave(&mut self) -> Option<()> {
        let (who, what) = self.some_holder()?;
        let Person { name, place, .. } = self.people[who];
        let lost = self.rng.random_bool(0.3);
        let left = if lost { "lost" } else { "left" };
        let thing = self.things[what].name;
        let told = self.then(&format!("{name} {left} the {thing} in the {place}"));
        self.arrive(who, place, told);
        self.locate(what, told);
        (self.things[what].holder, self.things[what].lost) = (None, lost);
        Some(())
    }

    fn give(&mut self) -> Option<()> {
        let (who, what) = self.some_holder()?;
        let Person { name, place, .. } = self.people[who];
        let whom = self.companion(who, place)?;
        let (other, thing) = (self.people[whom].name, self.things[what].name);
        let gave = self.pick(&["gave", "handed"]);
        let told = self.then(&format!("{name} {gave} {other} the {thing} in the {place}"));
        self.hold(whom, what, told);
        self.arrive(who, place, told);
        self.arrive(whom, place, told);
        self.locate(what, told);
        Some(())
    }

    /// Reminds the reader of how things stand.
    fn recall(&mut self) -> Option<()> {
        let now = self.sentences.len();
        let is_old = |told: Told| told.sentence + 1 < now;
        if self.rng.random_bool(0.3) {
            let who = self.some_walker()?;
            let Person { name, place, .. } = self.people[who];
            let told = self.say(&format!("{name} was still in the {place}"));
            self.arrive(who, place, told);
            return Some(());
        }
        let what = self.some_thing(|t| is_old(t.place_told) && is_old(t.holder_told))?;
        let Thing {
            name,
            place,
            holder,
            ..
        } = self.things[what];
        if let Some(who) = holder {
            let told = self.say(&format!("{} still had the {name}", self.people[who].name));
            self.hold(who, what, told);
        } else {
            let told = self.say(&format!("The {name} was still in the {place}"));
            self.locate(what, told);
        }
        Some(())
    }
}
