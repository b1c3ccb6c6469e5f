//! An object that was sealed and is not there any more, and what making it anew would cost.

use crate::api::ObstacleView;
use crate::model::advice::Advice;
use crate::model::problem::Problem;
use crate::vm::accepted_losses::AcceptedLosses;

/// What sealing an object takes.
#[derive(Debug)]
pub(super) enum Way<T> {
    Open(T),
    Lost(Loss),
}

#[derive(Debug)]
pub(super) struct Loss {
    /// As `--replace` takes it.
    object: String,
    /// What a new one lacks.
    cost: String,
    /// What was found, with what brings the object back.
    problem: Problem,
}

impl Loss {
    pub(super) fn nvram(problem: Problem) -> Self {
        Self {
            object: AcceptedLosses::NVRAM.to_owned(),
            cost: "boot entries and enrolled Secure Boot keys are lost".to_owned(),
            problem,
        }
    }

    pub(super) fn vtpm(problem: Problem) -> Self {
        Self {
            object: AcceptedLosses::VTPM.to_owned(),
            cost: "what the guest has bound to its TPM is lost (BitLocker asks for its recovery key, LUKS for a passphrase)"
                .to_owned(),
            problem,
        }
    }

    pub(super) fn disk(target: &str, problem: Problem) -> Self {
        Self {
            object: target.to_owned(),
            cost: format!("the data of disk {target} is lost"),
            problem,
        }
    }

    /// With what is to be said of what it is about.
    pub(super) fn told(self, tell: impl FnOnce(Problem) -> Problem) -> Self {
        Self {
            problem: tell(self.problem),
            ..self
        }
    }
}

/// Making all of a VM anew that is lost, as one command.
#[derive(Debug, Default)]
pub(super) struct Anew {
    objects: Vec<String>,
    costs: Vec<String>,
}

impl Anew {
    /// These, and what an admin has given up already.
    pub(super) fn of<'l>(losses: impl Iterator<Item = &'l Loss>, accepted: &AcceptedLosses) -> Self {
        let mut anew = Self {
            objects: accepted.objects().map(str::to_owned).collect(),
            costs: Vec::new(),
        };
        for loss in losses {
            anew.objects.push(loss.object.clone());
            anew.costs.push(loss.cost.clone());
        }
        anew
    }

    fn advice(&self, vm: &str) -> Advice {
        let again = Advice::SealReplacing {
            vm: vm.to_owned(),
            objects: self.objects.clone(),
        };
        again.note(format!("which makes that anew: {}", self.costs.join(", and ")))
    }
}

/// What stands in the way of a seal.
#[derive(Debug)]
pub(super) struct Obstacle {
    pub(super) problem: Problem,
    /// What `--replace` would have to name, if that would clear it.
    replace: Option<String>,
}

impl Obstacle {
    /// Brought back first of all; the last way is to make all anew.
    pub(super) fn of_loss(vm: &str, loss: Loss, all: &Anew) -> Self {
        let anew = all.advice(vm);
        let advice = match loss.problem.advice.clone() {
            Some(back) => back.then(Advice::SealVm(vm.to_owned())).or_else(anew),
            None => anew,
        };
        Self {
            problem: loss.problem.next(advice),
            replace: Some(loss.object),
        }
    }

    pub(super) fn view(&self) -> ObstacleView {
        ObstacleView {
            problem: (&self.problem).into(),
            replace: self.replace.clone(),
        }
    }
}

impl From<Problem> for Obstacle {
    fn from(problem: Problem) -> Self {
        Self {
            problem,
            replace: None,
        }
    }
}
