//! Conversations as prompts, by the template that a model carries.
//!
//! Templates are written in Jinja for Hugging Face's `apply_chat_template`, and have here what they have
//! there: `messages`, `tools`, `documents`, `add_generation_prompt`, the special tokens by their roles,
//! `raise_exception`, `strftime_now`, `tojson`, the methods of Python's strings, lists and dictionaries,
//! `break` and `continue`, and blocks whose line ends and indentation are trimmed.
//!
//! A template is a program from a file. It can do nothing but make text, and has a budget for its work and
//! memory, so that one that does not end is an error.

use super::{Tokenizer, TokenizerError, python};
use minijinja::{AutoEscape, Environment, Value, syntax::SyntaxConfig, value::Serde};
use serde::{Deserialize, Serialize};
use std::{borrow::Cow, collections::BTreeMap};

/// What a template may spend: about this many instructions, and 64 times as many bytes.
const FUEL: u64 = 1_000_000;

/// One message of plain text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks, in the words of the template: `system`, `user` or `assistant` in most.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of any role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }

    /// What holds for the whole conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// What the user says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// What the model said.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }
}

/// A conversation, and what else its template is given.
///
/// # Example
///
/// ```
/// use mtla_models::tokenizer::{Chat, Message, Tokenizer};
/// # let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama_mtla/tokenizer/tokenizer.json");
/// # let folder = tempfile::tempdir()?;
/// # let directory = folder.path();
/// # std::fs::copy(fixture, directory.join("tokenizer.json"))?;
///
/// std::fs::write(
///     directory.join("chat_template.jinja"),
///     "{% for m in messages %}[{{ m.role }}] {{ m.content.strip() }}\n{% endfor %}\
///      {% if add_generation_prompt %}[assistant]{% endif %}",
/// )?;
/// let tokenizer = Tokenizer::load(directory)?;
/// let messages = [Message::system("Be brief."), Message::user(" Hello! ")];
/// let chat = Chat::new(&messages).with_generation_prompt();
/// assert_eq!(tokenizer.render_chat(&chat)?, "[system] Be brief.\n[user] Hello!\n[assistant]");
/// let prompt = tokenizer.encode_chat(&chat)?;
/// assert_eq!(tokenizer.decode(&prompt)?, tokenizer.render_chat(&chat)?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Chat {
    template: Option<String>,
    variables: BTreeMap<String, Value>,
}

impl Chat {
    /// A conversation. Messages are usually [`Message`]s, and may be anything that has the fields that
    /// the template looks for, such as JSON.
    pub fn new<M: Serialize>(messages: &[M]) -> Self {
        let none = Value::from(());
        let defaults = [
            ("messages", Value::from(Serde(messages))),
            ("tools", none.clone()),
            ("documents", none),
            ("add_generation_prompt", Value::from(false)),
        ];
        Self {
            template: None,
            variables: defaults.map(|(name, value)| (name.into(), value)).into(),
        }
    }

    /// Ends the prompt where the model's answer begins.
    pub fn with_generation_prompt(self) -> Self {
        self.with("add_generation_prompt", &true)
    }

    /// Tools that the model may call, as JSON schemas.
    pub fn with_tools<T: Serialize>(self, tools: &[T]) -> Self {
        self.with("tools", tools)
    }

    /// Any further variable of the template, such as `enable_thinking`.
    pub fn with<T: Serialize + ?Sized>(mut self, name: &str, value: &T) -> Self {
        let value = Value::from(Serde(value));
        self.variables.insert(name.to_owned(), value);
        self
    }

    /// The template of this name, where a model has several.
    pub fn with_template(mut self, name: &str) -> Self {
        self.template = Some(name.to_owned());
        self
    }

    /// The name of the template: the one asked for, else the one for tools where there are some.
    fn template<'a>(&self, templates: &'a BTreeMap<String, String>) -> Option<&'a String> {
        if let Some(name) = &self.template {
            return templates.get(name);
        }
        let with_tools = !self.variables["tools"].is_none();
        let tool_use = templates.get("tool_use").filter(|_| with_tools);
        let only = templates.values().next().filter(|_| templates.len() == 1);
        tool_use.or_else(|| templates.get("default")).or(only)
    }
}

impl Tokenizer {
    /// Whether the model has a chat template.
    pub fn has_chat_template(&self) -> bool {
        !self.templates.by_name.is_empty()
    }

    /// The prompt of a conversation.
    ///
    /// # Errors
    ///
    /// If there is no template, or it is no template, refuses the conversation or does not end.
    pub fn render_chat(&self, chat: &Chat) -> Result<String, TokenizerError> {
        let Some(template) = chat.template(&self.templates.by_name) else {
            return Err(TokenizerError::NoChatTemplate {
                path: self.path.parent().unwrap_or(&self.path).to_owned(),
                name: chat.template.clone(),
            });
        };
        let roles = self.roles.iter();
        let mut variables: BTreeMap<&str, Value> = roles
            .map(|(&role, token)| (role, Value::from(token.as_str())))
            .collect();
        variables.extend(chat.variables.iter().map(|(k, v)| (k.as_str(), v.clone())));

        render(template, &variables).map_err(|error| TokenizerError::Chat {
            path: self.templates.path.clone(),
            reason: explain(&error),
        })
    }

    /// The tokens of a conversation's prompt. The template writes the special tokens itself.
    ///
    /// # Errors
    ///
    /// As for [`Self::render_chat`], and if the vocabulary has no token for a part of the prompt.
    pub fn encode_chat(&self, chat: &Chat) -> Result<Vec<u32>, TokenizerError> {
        self.encode_bare(&self.render_chat(chat)?)
    }
}

fn render(template: &str, variables: &BTreeMap<&str, Value>) -> Result<String, minijinja::Error> {
    let template = without_generation_blocks(template);
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    environment.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?,
    );
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    python::install(&mut environment);
    environment.template_from_str(&template)?.render(variables)
}

/// What went wrong, with the reasons below it and the line.
fn explain(error: &minijinja::Error) -> String {
    let mut reason = match error.kind() {
        minijinja::ErrorKind::OutOfFuel => {
            "it does too much work, or does not end; shorten the conversation or mend the template"
                .to_owned()
        }
        kind => match error.detail() {
            Some(detail) => detail.to_owned(),
            None => kind.to_string(),
        },
    };
    if let Some(line) = error.line() {
        reason = format!("line {line}: {reason}");
    }
    reason
}

/// `{% generation %}` marks what the model said, for training; the text is the same without it. Such tags
/// become conditions that always hold, so that the spaces around them are trimmed as before.
fn without_generation_blocks(template: &str) -> Cow<'_, str> {
    if !template.contains("generation") {
        return Cow::Borrowed(template);
    }
    let mut result = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let tag = &rest[start + 2..start + length];
        result.push_str(&rest[..start + 2]);
        let word = tag.trim_matches(|c: char| c.is_whitespace() || matches!(c, '-' | '+'));
        match word {
            "generation" => result.push_str(&tag.replacen(word, "if true", 1)),
            "endgeneration" => result.push_str(&tag.replacen(word, "endif", 1)),
            _ => result.push_str(tag),
        }
        rest = &rest[start + length..];
    }
    Cow::Owned(result + rest)
}
