"""For griffe, which reads the sources for the API page: the public names of `undiffuse`, and the shapes of tensors."""

import ast

import griffe

TENSORS = {"Float", "Int", "UInt8", "Shaped", "Bool"}


class Public(griffe.Extension):
    """`undiffuse.load` is `undiffuse.model.model.load`: what the table `_LAZY` says, but without running it."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        if pkg.path == "undiffuse":
            for name, module in ast.literal_eval(str(pkg["_LAZY"].value)).items():
                pkg.set_member(name, griffe.Alias(name, f"{module}.{name}", parent=pkg))


class Shapes(griffe.Extension):
    """A shape stays the text that it is: griffe would read "b *x" as a product of two types."""

    def on_node(self, *, node: ast.AST | griffe.ObjectNode, **kwargs: object) -> None:
        for part in ast.walk(node) if isinstance(node, ast.Module) else ():
            match part:
                case ast.Subscript(ast.Name(name), ast.Tuple([_, ast.Constant(str(text)) as shape])) if name in TENSORS:
                    shape.value = repr(text)  # one pair of quotes for griffe to take away
