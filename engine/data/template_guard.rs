//! Bounds on what a chat template may do: guards woven into its compiled instructions.
//!
//! minijinja pays for instructions, bytes and slots out of a budget of fuel, but not for what hides inside a value: lists that
//! are concatenated, repeated or sliced lazily, and values that hold another one many times over, which are small to
//! build and astronomic to print or compare. So every instruction that makes a value is followed by a guard that writes lazy
//! lists out and bounds the value *as if written out in full*, and every instruction whose work grows with the whole of its
//! operands is preceded by one that pays for it. The guards are functions under names that no template can spell.

use std::sync::Arc;

use minijinja::machinery::{Instruction, Instructions, Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{DynObject, Object, ObjectRepr, Tuple};
use minijinja::{Environment, Error, ErrorKind, State, Value};

/// Deepest nesting of lists and maps in a value.
const MAX_DEPTH: usize = 256;
/// Most attributes of a `namespace`.
const MAX_ATTRIBUTES: usize = 256;
/// Cost in bytes of a value inside another.
const SLOT: u64 = 32;
/// Bytes that one fuel pays for, as in the engine.
const BYTES_PER_FUEL: u64 = 64;

/// A variable that is 1.
const ONE: &str = "__one";

/// What a guard does with the operands on the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Duty {
    /// Pays for all that hangs below them.
    Weigh,
    /// Pays for their items.
    Count,
    /// Writes lazy lists out and bounds the result.
    Settle,
    /// As `Settle`, and refuses what must not be kept in another value.
    Keep,
}

impl Duty {
    const ALL: [Self; 4] = [Self::Weigh, Self::Count, Self::Settle, Self::Keep];

    fn name(self) -> &'static str {
        match self {
            Self::Weigh => "\0weigh",
            Self::Count => "\0count",
            Self::Settle => "\0settle",
            Self::Keep => "\0keep",
        }
    }
}

/// Gives a render its guards; no value may be larger than `limit` bytes when written out.
pub(super) fn install(env: &mut Environment<'_>, limit: u64) {
    for duty in Duty::ALL {
        env.add_global(duty.name(), Value::from_object(Guard { duty, limit }));
    }
    env.add_global(ONE, 1);
}

/// Most operators between a tag's braces.
const MAX_OPERATORS: usize = 256;

/// A source in which no constant list is repeated: the compiler evaluates constants, and compares or searches repeated lists at no
/// cost in fuel, so `[1] * n` becomes `[1] *__one* n`, which it leaves to the render.
///
/// # Errors
/// A tag of more than 256 operators, over which it takes quadratic time.
pub(super) fn unfold_repeats(source: &str, syntax: &SyntaxConfig) -> Result<String, Error> {
    let mut operators = 0;
    let (mut out, mut copied, mut before) = (String::with_capacity(source.len()), 0, Before::Other);
    let mut tokens = tokenize(source, false, syntax.clone()).map_while(Result::ok).peekable();
    while let Some((token, span)) = tokens.next() {
        operators = match token {
            Token::BlockStart | Token::VariableStart => 0,
            Token::Ident("and" | "or" | "not" | "in") => operators + 1,
            Token::Plus | Token::Minus | Token::Mul | Token::Div | Token::FloorDiv | Token::Pow => {
                operators + 1
            }
            Token::Mod | Token::Tilde | Token::Eq | Token::Ne | Token::Gt | Token::Gte => operators + 1,
            Token::Lt | Token::Lte => operators + 1,
            _ => operators,
        };
        if operators > MAX_OPERATORS {
            let line = span.start_line;
            return Err(refuse(format!("line {line}: a tag of more than {MAX_OPERATORS} operators")));
        }
        let list_after = matches!(tokens.peek(), Some((Token::BracketOpen | Token::ParenOpen, _)));
        // After a comma or an opening parenthesis it is no product but spreads arguments.
        let product = !matches!(before, Before::Opening);
        if matches!(token, Token::Mul) && product && (list_after || matches!(before, Before::Closing)) {
            let end = span.end_offset as usize;
            out.push_str(&source[copied..end]);
            out.push_str(ONE);
            out.push('*');
            copied = end;
        }
        before = match token {
            Token::BracketClose | Token::ParenClose => Before::Closing,
            Token::ParenOpen | Token::Comma => Before::Opening,
            _ => Before::Other,
        };
    }
    out.push_str(&source[copied..]);
    Ok(out)
}

/// What stands before a token.
enum Before {
    Closing,
    Opening,
    Other,
}

/// The same instructions with guards among them.
pub(super) fn weave<'s>(plain: &Instructions<'s>) -> Instructions<'s> {
    use Instruction as I;
    let mut out = Instructions::new(plain.name(), plain.source());
    let (mut new_address, mut end) = (vec![], 0);
    while let Some(instruction) = plain.get(new_address.len() as u32) {
        let pc = new_address.len() as u32;
        new_address.push(end);
        let mut add = |instruction| {
            let line = plain.get_line(pc).map_or(0, |line| u16::try_from(line).unwrap_or(u16::MAX));
            end = 1 + match plain.get_span(pc) {
                Some(span) => out.add_with_span(instruction, span),
                None => out.add_with_line(instruction, line),
            };
        };
        let (before, after) = guards_of(instruction);
        if let I::SetAttr(_) = instruction {
            // The stack holds the value and, above it, its namespace.
            add(I::CallFunction(Duty::Count.name(), Some(1)));
            add(I::Swap);
            add(I::CallFunction(Duty::Keep.name(), Some(1)));
            add(I::Swap);
        }
        if let Some((duty, operands @ 1..)) = before {
            add(I::CallFunction(duty.name(), Some(operands)));
            if operands > 1 {
                add(I::UnpackList(operands.into()));
            }
        }
        add(instruction.clone());
        if let Some(duty) = after {
            add(I::CallFunction(duty.name(), Some(1)));
        }
    }
    new_address.push(end);
    for pc in 0..end {
        if let Some(
            I::Jump(to)
            | I::JumpIfFalse(to)
            | I::JumpIfFalseOrPop(to)
            | I::JumpIfTrueOrPop(to)
            | I::Iterate(to)
            | I::BuildMacro(_, to, _),
        ) = out.get_mut(pc)
        {
            *to = new_address.get(*to as usize).copied().unwrap_or(end);
        }
    }
    out
}

/// What is paid for before an instruction, over how many operands, and what becomes of its result.
fn guards_of(instruction: &Instruction<'_>) -> (Option<(Duty, u16)>, Option<Duty>) {
    use Instruction as I;
    let weigh = |operands| Some((Duty::Weigh, operands));
    match instruction {
        I::Emit | I::GetItem => (weigh(1), None),
        I::Eq | I::Ne | I::Gt | I::Gte | I::Lt | I::Lte | I::In | I::CompareAndPreserve(_) => {
            (weigh(2), None)
        }
        I::StringConcat => (weigh(2), None),
        I::Add | I::Mul => (None, Some(Duty::Settle)),
        // Constants may be lazy too.
        I::LoadConst(value) if value.as_object().is_some() => (None, Some(Duty::Settle)),
        I::Slice => (weigh(4), Some(Duty::Settle)),
        I::BuildMap(_) | I::BuildList(_) | I::BuildTuple(_) => (None, Some(Duty::Keep)),
        I::MergeKwargs(n) | I::UnpackLists(n) => (weigh(u16::try_from(*n).unwrap_or(u16::MAX)), None),
        I::UnpackList(_) | I::PushLoop(_) | I::FastRecurse => (Some((Duty::Count, 1)), None),
        I::ApplyFilter(name, n, _) => {
            let shallow = ["length", "count", "default", "d"].contains(name);
            (n.filter(|_| !shallow).and_then(weigh), Some(Duty::Settle))
        }
        I::PerformTest(name, n, _) => {
            let shallow =
                ["defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number"];
            let shallow = shallow.contains(name) || ["boolean", "true", "false"].contains(name);
            (n.filter(|_| !shallow).and_then(weigh), None)
        }
        // A loop is called by any name that it was given, and starts again over its argument.
        I::CallFunction(_, Some(1)) => (Some((Duty::Count, 1)), Some(Duty::Settle)),
        I::CallFunction(..) | I::CallObject(_) => (None, Some(Duty::Settle)),
        I::CallMethod(_, n) => (n.and_then(weigh), Some(Duty::Settle)),
        _ => (None, None),
    }
}

#[derive(Debug)]
struct Guard {
    duty: Duty,
    limit: u64,
}

impl Object for Guard {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Result<Value, Error> {
        let (mut bytes, mut settled) = (0, None);
        for value in args {
            let Some(object) = value.as_object() else {
                // Strings are paid for where they are made; an operand costs another look at it.
                bytes += value.as_str().map_or(0, |s| s.len() as u64 / 8);
                continue;
            };
            if self.duty == Duty::Count {
                bytes += SLOT * object.enumerator_len().unwrap_or(0) as u64;
                crowded(object)?;
                continue;
            }
            let mut left = self.limit;
            settled = settle(value, usize::from(self.duty == Duty::Keep), &mut left)?;
            // Once for the walk and once for the work that it announces.
            bytes += 2 * (self.limit - left);
            if self.duty == Duty::Keep && object.repr() == ObjectRepr::Map {
                // Keys may be chosen to collide.
                let keys = object.enumerator_len().unwrap_or(0) as u64;
                bytes += keys * keys / 2;
            }
        }
        if bytes > 0 {
            state.consume_fuel(bytes.div_ceil(BYTES_PER_FUEL))?;
        }
        match args {
            [value] => Ok(settled.unwrap_or_else(|| value.clone())),
            _ => Ok(Value::from(Tuple::from(args.iter().rev().cloned().collect::<Vec<_>>()))),
        }
    }
}

fn refuse(what: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// Is this one of the engine's own kinds of object?
fn is_a(object: &DynObject, kind: &str) -> bool {
    object.type_name().ends_with(kind)
}

fn crowded(object: &DynObject) -> Result<(), Error> {
    match is_a(object, "Namespace") && object.enumerator_len() > Some(MAX_ATTRIBUTES) {
        true => Err(refuse(format!("a namespace of more than {MAX_ATTRIBUTES} attributes"))),
        false => Ok(()),
    }
}

/// Takes the size of a value from `left` and gives its written-out twin where any part of it is lazy.
///
/// # Errors
/// Out of fuel when the value is larger than `left`; nesting beyond 256; below the top (`depth` > 0), namespaces, loops, macros
/// and functions, through which a value could hold itself.
fn settle(value: &Value, depth: usize, left: &mut u64) -> Result<Option<Value>, Error> {
    let own = SLOT + value.as_str().map_or(0, |s| s.len() as u64);
    *left = left
        .checked_sub(own)
        .ok_or_else(|| Error::new(ErrorKind::OutOfFuel, "a value of the template grows beyond all bounds"))?;
    let Some(object) = value.as_object() else { return Ok(None) };
    if depth > MAX_DEPTH {
        return Err(refuse(format!("values nested more than {MAX_DEPTH} deep")));
    }
    let own_kind = ["Namespace", "Loop", "Macro", "Module"].iter().any(|kind| is_a(object, kind));
    if depth > 0 && (own_kind || object.repr() == ObjectRepr::Plain) {
        return Err(refuse("a namespace, loop, macro or function cannot be kept in another value".into()));
    }
    match object.repr() {
        ObjectRepr::Seq | ObjectRepr::Iterable => {
            let eager = object.downcast_ref::<Vec<Value>>().map(Vec::as_slice);
            let tuple = object.downcast_ref::<Tuple>();
            let mut changed = None;
            if let Some(items) = eager.or(tuple.map(|t| &t[..])) {
                for (i, item) in items.iter().enumerate() {
                    if let Some(new) = settle(item, depth + 1, left)? {
                        changed.get_or_insert_with(|| items.to_vec())[i] = new;
                    }
                }
            } else {
                let items = changed.insert(vec![]);
                for item in value.try_iter()?.checked() {
                    let item = item?;
                    items.push(settle(&item, depth + 1, left)?.unwrap_or(item));
                }
            }
            Ok(changed.map(|items| match tuple {
                Some(_) => Value::from(Tuple::from(items)),
                None => Value::from(items),
            }))
        }
        ObjectRepr::Map => {
            crowded(object)?;
            let fixed = own_kind || object.type_name().contains("Kwargs");
            let (mut pairs, mut changed) = (vec![], !object.type_name().contains("IndexMap<"));
            for (key, item) in object.try_iter_pairs().into_iter().flatten() {
                settle(&key, depth + 1, left)?;
                let new = settle(&item, depth + 1, left)?;
                changed |= new.is_some();
                pairs.push((key, new.unwrap_or(item)));
            }
            Ok((changed && !fixed).then(|| Value::from_pairs(pairs)))
        }
        _ => Ok(None),
    }
}
